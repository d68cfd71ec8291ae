"""The kernel for TPUs, in JAX's interpreter and compiled for chips that are not here."""

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_rows import REACHES, arrays, close, graded, tokens, written
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.cost import hlo
from jaxdistill.models.axes import AXES, ROWS, TENSOR
from jaxdistill.models.core import splash
from jaxdistill.models.core.attention import Attended, Reach, Tokens

ROW = tokens([130, 100, 40, -30], [1, 269, -30])


def real(attend: Any, inputs: Attended, **settings: Any) -> jax.Array:
    """Attention with 0 at padding, where kernels differ and nobody looks."""
    return jnp.where(ROW.document[:, :, None, None] > 0, attend(inputs, **settings), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reach", "cap"), [*zip(REACHES.values(), (0.0, 2.0, 0.0, 2.0, 0.0), strict=True)], ids=REACHES
)
def test_value_and_gradient(reach: tuple[int, int], cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In three blocks, the last of which is filled up."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    arguments = (*arrays(300), ROW, ROW)
    kernels = (partial(splash.splash, interpret=True), written)
    close(*(graded(partial(real, attend), Reach(*reach), cap=cap)(*arguments) for attend in kernels), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install 'jaxdistill[tpu]'")
@pytest.mark.parametrize(("name", "size"), [("causal", 64), ("window both ways", 128), ("both ways", 256)])
def test_compiled_for_four_chips(name: str, size: int) -> None:
    """Every chip runs the three kernels on its own rows and heads, and nothing is sent."""
    from jaxdistill.cost.program import devices_of

    mesh = Mesh(np.array(devices_of("v5e:2x2")).reshape(2, 1, 2), AXES)
    rows, heads = (NamedSharding(mesh, PartitionSpec(ROWS, *rest)) for rest in ((), (None, TENSOR)))
    query, key = (jax.ShapeDtypeStruct((4, 1000, count, size), jnp.bfloat16, sharding=heads) for count in (4, 2))
    numbers: Any = jax.ShapeDtypeStruct((4, 1000), jnp.int32, sharding=rows)
    row = Tokens(numbers, numbers)
    run = graded(splash.splash, Reach(*REACHES[name]), cap=30.0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = run.lower(query, key, key, row, row).compile().as_text()
    assert text.count("tpu_custom_call") == 3
    assert hlo.collectives(text) == {}
