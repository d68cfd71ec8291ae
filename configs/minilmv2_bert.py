r"""BERT distilled into a student of 6 layers, half as wide, by self-attention relations (MiniLMv2, arXiv:2012.15828).

    python -m jaxdistill.train --config configs/minilmv2_bert.py --workdir runs/minilm \
        --config.teacher.name=bert-base-uncased --config.data.path=corpus.txt
    jaxdistill export --to-pytorch --workdir runs/minilm --out student/

The relations of queries, keys and values of the teacher's last layer are all that is imitated, at 48 relation heads;
for BERT-large take `loss.relation_layer=20` and 64 heads. So the student may have any width that 48 divides, and the
head over the vocabulary stays as it was drawn: what is trained is an encoder to be fine-tuned, and there is no
perplexity to measure. With `loss.alpha_mlm=1.0` the head is trained beside it. Batch size, rate and 400,000 steps are
the paper's.

Time: about 70 hours on one NVIDIA H200 for all steps on full rows, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet. The paper's student of this size has 81.8 on GLUE.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "bert-base-uncased"
    config.student.init = "random"
    config.student.overrides = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}
    config.data.max_length = 512
    config.train.batch_size = 256
    config.train.accumulation = 8  # micro-batches of 32 rows
    config.train.steps = 400_000
    config.optim.learning_rate = 6e-4
    config.optim.warmup = 0.01
    config.loss.alpha_relation = 1.0
    config.loss.alpha_ce = config.loss.alpha_mlm = config.loss.alpha_cos = 0.0
    config.evaluate.metrics = ()
    config.checkpoint.best = ""
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
        config.student.overrides = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192}
        config.loss.relation_heads = 16
    return config
