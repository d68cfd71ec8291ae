r"""GPT-2-medium distilled into GPT-2 on summaries of news, by a divergence of their next-token distributions.

    python -m jaxdistill.train --config configs/gpt2_kd.py --workdir runs/kd \
        --config.teacher.name=runs/finetune/export-pytorch --config.student.name=gpt2 \
        --config.data.path=train.csv --config.data.eval_path=validation.csv

A variant follows the file, as in `--config configs/gpt2_kd.py:jsd`: the name of a divergence, that is forward_kl (the
default), reverse_kl, symmetric_kl, jsd, skewed_kl and skewed_reverse_kl (DistiLLM's, with a skew of 0.1) or
total_variation; on_policy (GKD: half of the updates learn from text that the student writes, by the JSD); sequence (the
student learns from text that the teacher writes); distillm2 (DistiLLM-2: a third of the updates learn from text of the
student, a third from text of the teacher, and each has a skewed divergence of its own); uncertain (the fifth of the
tokens that the student is least certain of, SE-KD).
`:smoke` runs the same path in seconds, on the causal model and the pairs of the quickstart. ROUGE needs
pip install 'jaxdistill[rouge]'.

Time: 3.4 hours on one NVIDIA H200 for three epochs of CNN/DailyMail, reckoned (docs/times.md); on_policy, sequence and
distillm2 take longer by the time to write text, which is not known.

Result: nobody has run this recipe at full size yet. docs/results.md compares the objectives on small models.
"""

import runpy
from pathlib import Path

from jaxdistill.config import DIVERGENCES, Config, check_variant


def get_config(variant: str = "forward_kl") -> Config:
    check_variant(variant, *DIVERGENCES, "on_policy", "sequence", "distillm2", "uncertain", "smoke")
    # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
    recipe = lambda name: runpy.run_path(str(Path(__file__).resolve().parent / name))  # noqa: E731
    config = recipe("gpt2_finetune.py")["get_config"]()
    config.teacher.name = "gpt2-medium"
    config.loss.tokens = "labels"  # those of the summary
    config.loss.temperature = 1.0
    config.loss.alpha_ce, config.loss.alpha_clm, config.loss.alpha_cos = 1.0, 0.5, 0.0
    config.evaluate.metrics = ("perplexity", "agreement", "rouge")
    if variant in DIVERGENCES:
        config.loss.divergence = variant
        config.loss.beta = 0.1 if variant.startswith("skewed") else 0.5
    elif variant == "on_policy":
        config.loss.divergence, config.loss.beta = "jsd", 0.5
        config.sample.student = 0.5
    elif variant == "sequence":
        config.loss.alpha_ce, config.loss.alpha_clm = 0.0, 1.0
        config.sample.teacher = 1.0
    elif variant == "distillm2":
        config.loss.divergence, config.loss.beta = "distillm2", 0.1
        config.sample.student, config.sample.teacher = 1 / 3, 1 / 3
    elif variant == "uncertain":
        config.loss.tokens, config.loss.share = "uncertain", 0.2
        config.loss.alpha_clm = 0.0  # of all tokens, it would need the head's work on all
    elif variant == "smoke":
        recipe("quickstart.py")["smoke_causal"](config)
    return config
