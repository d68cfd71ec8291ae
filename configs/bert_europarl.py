r"""BERT distilled on the English half of Europarl, the debates of the European Parliament (Koehn 2005).

    python -m jaxdistill.train --config configs/bert_europarl.py --workdir runs/europarl \
        --config.data.path=europarl-v7.de-en.en
    jaxdistill export --to-pytorch --workdir runs/europarl --out student/

As Universal Language Model Distillation does it: a general teacher, the text of one field, and masked language
modelling beside the imitation. The file has a sentence in a line, 1.9 million of them and some 50 million words for
German and English, so three epochs are 22,000 updates. A sentence is read with no other around it; packing them
(`data.batching=packed`) fills the rows, but lets a sentence attend to its neighbours.

Time: some 40 minutes on one NVIDIA H200 for the three epochs, reckoned (docs/times.md).

Result: nobody has run this recipe at full size yet.

`:smoke` runs the same path in seconds, on the teacher and text of the quickstart.
"""

import runpy
from pathlib import Path

from jaxdistill.config import Config, base, check_variant


def get_config(variant: str = "") -> Config:
    check_variant(variant, "smoke")
    config = base()
    config.teacher.name = "bert-base-uncased"
    config.student.layers = 6
    config.data.max_length = 128
    config.data.buckets = (32, 64, 128)
    config.data.eval_fraction = 0.01
    config.loss.tokens = "masked"
    config.loss.alpha_ce, config.loss.alpha_mlm, config.loss.alpha_cos = 5.0, 2.0, 1.0
    config.train.batch_size = 256
    config.train.accumulation = 2
    config.train.epochs = 3.0
    config.evaluate.prompts = (
        "I declare the [MASK] resumed.",
        "The [MASK] has adopted a proposal on agriculture.",
    )
    if variant == "smoke":
        # Recipes are files, not modules of a package: any of them can be copied and changed by itself.
        runpy.run_path(str(Path(__file__).resolve().parent / "quickstart.py"))["smoke"](config)
        config.student.layers = 2
    return config
