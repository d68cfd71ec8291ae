"""The memory of a forward pass, as a process of its own measures it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill.evaluate import footprint
from jaxdistill.models.model import param_shapes


@pytest.mark.slow
def test_a_pass_takes_its_weights_and_no_more_than_twice_what_the_compiler_lays_out() -> None:
    """A wide embedding, beside which what a process allocates for itself is small."""
    model = tiny.model("bert", vocab_size=200_000)
    weights = sum(int(np.prod(x.shape)) * 4 for x in jax.tree.leaves(param_shapes(model)))
    found = footprint.measure_peak(model, dtype=jnp.float32, rows=1, length=8)
    assert found is not None and weights < found < 2 * (weights + 4 * 8 * 200_000)


def test_what_cannot_be_measured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a process that takes the device alone, as of a TPU, is not the one that measures."""
    monkeypatch.setattr(footprint.sys, "executable", "false")
    assert footprint.measure_peak(tiny.model("bert"), dtype=jnp.float32, rows=1, length=8) is None
