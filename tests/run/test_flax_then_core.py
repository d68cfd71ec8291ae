"""A run that began on transformers' Flax class goes on with the modules of this package (`student.classes`)."""

import numpy as np
import pytest
import tiny_run

from jaxdistill import train
from jaxdistill.models.flax.supported import has_flax_class

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_flax_class("bert"), reason="the installed transformers has no Flax classes"),
]
# Without dropout, whose random numbers the two draw in another order.
STEADY = {
    "checkpoint__every": 2,
    "student__overrides": "{'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}",
}
CORE = {"student__classes": "core", "teacher__classes": "core"}


def test_a_run_goes_on_with_the_core(tmp_path, monkeypatch):
    tiny = tiny_run.make(tmp_path)
    tiny_run.train(tiny, tmp_path / "flax", **STEADY, student__classes="flax", teacher__classes="flax")
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Stopped):
        tiny_run.stop_after(patch, 3)
        train.main(tiny_run.arguments(tiny, tmp_path / "run", **STEADY, student__classes="flax"))
    code, _, err = tiny_run.call(train.main, tiny_run.arguments(tiny, tmp_path / "run", **STEADY, **CORE))
    assert code == 0 and "resumed" in err, err
    ours, theirs = tiny_run.saved(tmp_path / "run"), tiny_run.saved(tmp_path / "flax")
    # The bias of keys has a gradient of 0 up to rounding, which Adam makes as large as any.
    compared = [name for name in theirs if name.startswith("student") and "['key']['bias']" not in name]
    assert compared and all(name in ours for name in compared)
    for name in compared:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5, err_msg=name)
    figures = [tiny_run.records(folder, "eval")[-1]["perplexity"] for folder in (tmp_path / "run", tmp_path / "flax")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
