"""Products with a matrix of rows: the same numbers in either order of the factors, and the shapes of the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.products import FEW, times_rows


@pytest.mark.parametrize("tokens", [(3,), (2, FEW // 2), (2, FEW // 2 + 1), ()], ids=str)
def test_few_tokens_and_many_are_multiplied_alike(tokens) -> None:
    rng = np.random.default_rng(0)
    x, rows = rng.normal(size=(*tokens, 5)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(times_rows(jnp.asarray(x), jnp.asarray(rows)), x @ rows.T, rtol=1e-5, atol=1e-5)


def test_sums_have_their_own_dtype() -> None:
    for tokens in (2, FEW + 1):
        shape = jax.eval_shape(
            lambda x, rows: times_rows(x, rows, sums=jnp.float32),
            jax.ShapeDtypeStruct((tokens, 5), jnp.bfloat16),
            jax.ShapeDtypeStruct((7, 5), jnp.bfloat16),
        )
        assert shape == jax.ShapeDtypeStruct((tokens, 7), jnp.float32)
