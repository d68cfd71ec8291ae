"""Traces of a few steps, and how well a run uses its devices."""

from typing import Any

import jax.numpy as jnp
import pytest
import tiny_run
from transformers import AutoConfig

from jaxdistill.config import Config, LogConfig, steps_to_profile
from jaxdistill.errors import UserError
from jaxdistill.knobs import checked
from jaxdistill.models.arithmetic import forward_flops
from jaxdistill.models.model import build_model
from jaxdistill.models.pair import Pair
from jaxdistill.run import utilisation
from jaxdistill.run.profile import Profiler
from jaxdistill.step import chips

CHIP = chips.Chip(flops=1e12, bandwidth=1e9, memory=2**40)


def test_steps_are_a_range_without_its_end():
    assert list(steps_to_profile("10:13")) == [10, 11, 12]
    for text in ("10", "13:10", "10:10", "0:3", "a:b", "-1:3", "1:2:3", ":", "²:3", "1:99999999999999999999"):
        with pytest.raises(UserError, match=r"config\.profile=.* must be FIRST:END with 1 <= FIRST < END"):
            checked(LogConfig, {"profile": text})
    assert checked(LogConfig, {"profile": "1:2"}).profile == "1:2" and checked(LogConfig, {}).profile == ""


@pytest.mark.slow
def test_a_trace_is_written_of_the_steps_and_of_an_early_end(tiny, tmp_path):
    tiny_run.train(tiny, tmp_path / "run", train__steps=4, log__profile="2:4")
    assert [path.stat().st_size > 1000 for path in (tmp_path / "run" / "profile").rglob("*.xplane.pb")] == [True]
    lines: list[str] = []
    profiler = Profiler("3:100", tmp_path / "early", lines.append)
    for at in range(1, 5):
        with profiler.step(at):
            total = jnp.ones(3).sum()
        profiler.after(at, total)
    assert lines == []
    profiler.close()
    profiler.close()
    assert len(list((tmp_path / "early").rglob("*.xplane.pb"))) == len(lines) == 1 and "xprof --logdir" in lines[0]


def bert(**fields: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return build_model(AutoConfig.for_model("bert", **{**sizes, "vocab_size": 100, **fields}))


def test_arithmetic_by_hand():
    """Of BERT: queries, keys, values, output, two of the feed-forward network; the head's transform; the words."""
    layer = 4 * 16 * 16 + 2 * 16 * 64
    expected = 2 * (3 * layer + 16 * 16) + 4 * 3 * 16 * 20 + 2 * 0.15 * 100 * 16
    assert forward_flops(bert(), length=20, head_share=0.15) == pytest.approx(expected)
    llama = build_model(
        AutoConfig.for_model(
            "llama",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=100,
            tie_word_embeddings=False,
        )
    )
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 48
    assert forward_flops(llama, length=10, head_share=1.0) == pytest.approx(
        2 * 2 * layer + 4 * 2 * 16 * 10 + 2 * 100 * 16
    )


def test_figures_where_the_peak_is_known(monkeypatch):
    pair = Pair(bert(num_hidden_layers=1), {}, bert(), {}, None, None)
    config = Config()
    assert utilisation.rates_of(config, pair)(8000.0, 20.0) == {}  # no such peak of a CPU
    monkeypatch.setitem(chips.CHIPS, "cpu", CHIP)
    figures = utilisation.rates_of(config, pair)(8000.0, 20.0)
    assert pair.teacher is not None
    work = 3 * forward_flops(pair.student, length=20, head_share=1) + forward_flops(
        pair.teacher, length=20, head_share=1
    )
    assert figures == {"tokens_per_s_per_device": 1000.0, "mfu": pytest.approx(8000 * work / 8e12)}
    assert "mfu" not in utilisation.rates_of(config.changed(student={"layer_drop": 0.2}), pair)(8000.0, 20.0)
    masked = utilisation.rates_of(config.changed(loss={"tokens": "masked"}), pair)(8000.0, 20.0)
    assert masked["mfu"] < figures["mfu"]
