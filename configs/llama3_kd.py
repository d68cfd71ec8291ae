r"""Llama-3.1-8B distilled into Llama-3.2-1B on plain text, by the forward KL of their next-token distributions.

    python -m jaxdistill.train --config configs/llama3_kd.py --workdir runs/llama3 \
        --config.teacher.name=meta-llama/Llama-3.1-8B --config.student.name=meta-llama/Llama-3.2-1B \
        --config.data.path='corpus/*.txt'

Documents are packed into rows of 2,048 tokens; tokens see their own document alone. Without --config.student.name and
with --config.student.layers=every_other the student is cut out of the teacher. The hub asks for consent to Llama's
licence before it gives the weights. Compiled for a v5e:2x4 (docs/scaling.md), an update takes 14.7 of the 17.2 GB of
each chip, and 4.3 s at the chips' peaks:

    jaxdistill plan --config configs/llama3_kd.py --topology v5e:2x4

Time: 4.6 to 20 hours on the eight chips of a v5e:2x4 for every billion tokens, by `plan` (docs/times.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on a small Llama 3 and the text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "meta-llama/Llama-3.1-8B"
    config.student.name = "meta-llama/Llama-3.2-1B"
    config.teacher.dtype = config.student.dtype = "bfloat16"
    config.teacher.scan = config.student.scan = True  # 32 layers compile in the time of a few
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
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke_packed"](config, "llama3")
    return config
