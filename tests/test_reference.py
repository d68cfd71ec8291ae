"""docs/settings.md is what the sections declare."""

from pathlib import Path

from jaxdistill.config import Config
from jaxdistill.reference import settings_reference

FILE = Path(__file__).parents[1] / "docs" / "settings.md"


def test_the_reference_is_up_to_date():
    assert FILE.read_text() == settings_reference(), "run `python -m jaxdistill.reference > docs/settings.md`"


def test_keys_stand_in_the_order_of_declaration_with_default_rule_and_explanation():
    text = settings_reference()
    sections = [name for name in Config.model_fields if name != "seed"]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == sections
    assert "| `optim.warmup` | `0.05` | between 0 and 1 | Share of all steps in which the learning rate " in text
    assert "| `data.threads` * | `2` | between 1 and 1024 | Threads that read " in text  # may change on resume
    assert r"(norm\|ln_[a-z0-9]+)" in text  # a bar would end the cell
