"""Rules of the settings that reading and preparing text rely on."""

import re

import pytest

from jaxdistill.data.settings import DataConfig
from jaxdistill.errors import UserError
from jaxdistill.knobs import checked


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "{completion}",
        "{completion} {prompt}",
        "{prompt} {completion}.",
        "{prompt} {prompt} {completion}",
        "{prompt} {completion} {completion}",
        "{prompt} { completion }",
        " ",
    ],
)
def test_bad_templates(template):
    with pytest.raises(UserError, match=re.escape(f"data.template={template!r}: must hold {{prompt}} once")):
        checked(DataConfig, {"template": template}, name="data")


def test_values_out_of_range():
    with pytest.raises(UserError, match=r"source='texts': must be one of text, csv"):
        checked(DataConfig, {"source": "texts"})
    with pytest.raises(UserError, match="limit=-1"):
        checked(DataConfig, {"limit": -1})
    with pytest.raises(UserError, match="max_length=3"):
        checked(DataConfig, {"max_length": 3})
