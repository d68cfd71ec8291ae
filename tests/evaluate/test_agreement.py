"""The place of a word in a model's order, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.evaluate.agreement import rank_of


def test_a_rank_is_the_place_in_a_sort() -> None:
    """With ties, which a stable sort leaves in order, as argmax and top_k do."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 12, (6, 7, 40)).astype(np.float32)
    words = rng.integers(0, 40, (6, 7))
    order = np.argsort(-logits, axis=-1, kind="stable")
    wanted = np.argmax(order == words[..., None], axis=-1)
    np.testing.assert_array_equal(rank_of(jnp.asarray(logits), jnp.asarray(words)), wanted)


def test_the_best_word_and_the_best_five() -> None:
    logits = jnp.round(4 * jax.random.normal(jax.random.key(0), (50, 30)))
    best, five = logits.argmax(axis=-1), jax.lax.top_k(logits, 5)[1]
    np.testing.assert_array_equal(rank_of(logits, best), 0)
    for place in range(5):
        np.testing.assert_array_equal(rank_of(logits, five[:, place]), place)
