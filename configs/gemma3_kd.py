r"""Gemma 3 1B distilled into Gemma 3 270M on plain text, by the forward KL of their next-token distributions.

    python -m jaxdistill.train --config configs/gemma3_kd.py --workdir runs/gemma3 \
        --config.teacher.name=google/gemma-3-1b-pt --config.student.name=google/gemma-3-270m \
        --config.data.path='corpus/*.txt'

Documents are packed into rows of 2,048 tokens; tokens see their own document alone. The models of 4B parameters and
more also see pictures and are of another type (gemma3), which is not read here. The hub asks for consent to Gemma's
licence before it gives the weights. Compiled for a v5e:2x4 (docs/scaling.md), an update takes 9.7 of the 17.2 GB of
each chip, and 0.8 s at the chips' peaks:

    jaxdistill plan --config configs/gemma3_kd.py --topology v5e:2x4 \
        --config.teacher.scan=True --config.student.scan=True

Time: 0.8 to 3.8 hours on the eight chips of a v5e:2x4 for every billion tokens, by `plan` (docs/times.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on a small Gemma 3 and the text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "google/gemma-3-1b-pt"
    config.student.name = "google/gemma-3-270m"
    config.teacher.dtype = config.student.dtype = "bfloat16"
    config.student.remat = "full"
    config.mesh.fsdp = 8  # the eight chips of a v5e:2x4 split the parameters of both models
    config.data.batching = "packed"
    config.data.max_length = 2048
    config.data.buckets = (2048,)
    config.mask.group = 1
    config.loss.temperature = 1.0
    config.loss.alpha_ce, config.loss.alpha_clm, config.loss.alpha_cos = 1.0, 0.0, 0.0
    config.train.batch_size = 128
    config.train.accumulation = 8
    config.train.epochs = 1.0
    config.optim.learning_rate = 1e-4
    config.optim.schedule = "cosine"
    config.optim.clip = 1.0
    config.evaluate.batch_size = 16
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke_packed"](config, "gemma3")
    return config
