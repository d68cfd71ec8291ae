r"""Qwen3-4B distilled into Qwen3-0.6B on prompts and answers, by a divergence of their next-token distributions.

    python -m jaxdistill.train --config configs/qwen3_kd.py --workdir runs/qwen3 \
        --config.teacher.name=Qwen/Qwen3-4B --config.student.name=Qwen/Qwen3-0.6B \
        --config.data.path=train.jsonl --config.data.eval_path=validation.jsonl

The text is a JSON object a line with the keys `prompt` and `completion`; the template is Qwen's chat format with
thinking switched off. The two models pad their embeddings alike and share a tokenizer.

A variant follows the file: forward_kl (the default), or on_policy (GKD, Agarwal et al. 2023, arXiv:2306.13649: half of
the updates learn from answers that the student writes, by the JSD).

Time: 2.5 to 12 hours on the eight chips of a v5e:2x4 for every billion tokens, by `plan` (docs/times.md). An update
takes 7.9 of the 17.2 GB of each chip (docs/scaling.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on a small Qwen3 and the pairs of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant

CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{completion}"


def get_config(variant: str = "forward_kl") -> Config:
    check_variant(variant, "forward_kl", "on_policy", "smoke")
    config = base()
    config.teacher.name = "Qwen/Qwen3-4B"
    config.student.name = "Qwen/Qwen3-0.6B"
    config.teacher.dtype = config.student.dtype = "bfloat16"
    # Layers as a loop compile sooner, and the kernels of one layer at a time are gathered: without it 22 GB a chip.
    config.teacher.scan = config.student.scan = True
    config.student.remat = "full"
    config.mesh.fsdp = 8  # the eight chips of a v5e:2x4 split the parameters of both models
    config.data.source = "jsonl"
    config.data.prompt_column, config.data.column = "prompt", "completion"
    config.data.template = CHAT
    config.data.max_length = 1024
    config.data.buckets = (512, 1024)
    config.mask.group = 1
    config.loss.tokens = "labels"  # those of the answer
    config.loss.temperature = 1.0
    config.loss.alpha_ce, config.loss.alpha_clm, config.loss.alpha_cos = 1.0, 0.0, 0.0
    config.train.batch_size = 64
    config.train.accumulation = 4
    config.train.epochs = 2.0
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.optim.clip = 1.0
    config.evaluate.batch_size = 16
    if variant == "on_policy":
        config.loss.divergence, config.loss.beta = "jsd", 0.5
        config.sample.student = 0.5
        config.sample.max_new_tokens = 256
    elif variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke_causal"](config, "qwen3")
    return config
