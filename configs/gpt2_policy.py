r"""GPT-2-medium distilled into GPT-2 on summaries of news, by policy gradient: MiniLLM (Gu et al. 2024).

    python -m jaxdistill.train --config configs/gpt2_policy.py --workdir runs/policy \
        --config.teacher.name=runs/finetune/export-pytorch --config.student.name=runs/student/export-pytorch \
        --config.data.path=train.csv --config.data.eval_path=validation.csv

The student should be fine-tuned first (configs/gpt2_finetune.py), because it learns from the text that it writes. Every
update has one completion of each row's prompt, drawn from 0.8 x student + 0.2 x teacher, and the row itself, for the
language-modelling term. `:penalties` adds the three penalties of the PyTorch scripts (docs/coming-from.md) in a
differentiable form; `:lmops` computes what the code of MiniLLM's authors does where it differs from the paper; `:smoke`
runs the same path in seconds, on the causal model and the pairs of the quickstart. ROUGE needs
pip install 'jaxdistill[rouge]'.

Time: more than 5 hours on one NVIDIA H200 for three epochs of CNN/DailyMail, reckoned (docs/times.md): the time to
write the completions comes on top, and is not known.

Result: nobody has run this recipe at full size yet. docs/results.md compares the objectives on small models.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "penalties", "lmops", "smoke")
    # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
    recipe = lambda name: runpy.run_path(str(Path(__file__).resolve().parent / name))  # noqa: E731
    config = recipe("gpt2_finetune.py")["get_config"]()
    config.teacher.name = "gpt2-medium"
    config.loss.tokens = "labels"
    config.loss.alpha_ce, config.loss.alpha_cos = 0.0, 0.0
    config.loss.alpha_policy, config.loss.alpha_clm = 1.0, 0.5
    config.policy.mixture = 0.2
    config.sample.max_new_tokens = 100
    config.optim.learning_rate = 5e-6
    config.optim.schedule = "constant"
    config.evaluate.metrics = ("perplexity", "agreement", "rouge")
    if variant == "penalties":
        config.loss.alpha_repetition, config.loss.alpha_diversity, config.loss.alpha_entropy = 0.1, 0.1, 0.01
    elif variant == "lmops":
        config.policy.semantics = "lmops"
    elif variant == "smoke":
        recipe("quickstart.py")["smoke_causal"](config)
    return config
