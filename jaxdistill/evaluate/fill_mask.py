"""The most likely words for a mask token, as a person would try out a model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdistill.data.prompts import framed_ids
from jaxdistill.errors import UserError
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import Model

PROMPTS = "config.evaluate.prompts"


Words = list[tuple[str, float]]  # words and their probabilities, the likeliest first


def make_fill_mask(
    model: Model, tokenizer: Any, texts: Sequence[str], *, top: int = 5, where: str = PROMPTS
) -> Callable[[PyTree], list[Words]]:
    """A function of the parameters: the `top` words for the first mask token of every text.

    The texts are one batch, padded to the longest. The program is compiled at the first call, and the head runs on the
    mask tokens alone.

    Args:
      where: as for `encode_prompts`.

    Raises:
      UserError: as `encode_prompts`.
    """
    if not texts:
        return lambda params: []
    encoded = encode_prompts(tokenizer, texts, max_length=model.max_length, where=where)
    ids, mask = padded(encoded)
    masked = np.array([[row.index(tokenizer.mask_token_id)] for row in encoded])

    @jax.jit
    def best(params: PyTree) -> tuple[Float[Array, "texts top"], Int[Array, "texts top"]]:
        logits = intercept.apply(model, params, Inputs(ids, mask), positions=jnp.asarray(masked)).logits[:, 0]
        probabilities, words = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top)
        return probabilities, words

    def fill(params: PyTree) -> list[Words]:
        probabilities, words = jax.device_get(best(params))
        return [
            [(tokenizer.decode([int(w)]).strip(), float(p)) for w, p in zip(*row, strict=True)]
            for row in zip(words, probabilities, strict=True)
        ]

    return fill


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Array, "rows length"], Bool[Array, "rows length"]]:
    """(token ids, which of them are real): rows filled up to the longest on their right."""
    mask = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return jnp.asarray(ids), jnp.asarray(mask)


def encode_prompts(tokenizer: Any, texts: Sequence[str], *, max_length: int, where: str = PROMPTS) -> list[list[int]]:
    """Token ids of texts, where `[MASK]` stands for the mask token of any tokenizer.

    Args:
      where: what gave the texts, for messages.

    Raises:
      UserError: a text has no `[MASK]`, or more than `max_length` tokens.
    """
    encoded = framed_ids(tokenizer, [text.replace("[MASK]", tokenizer.mask_token) for text in texts])
    for text, ids in zip(texts, encoded, strict=True):
        if tokenizer.mask_token_id not in ids:
            raise UserError(f"{where}: {text!r} holds no [MASK]")
        if len(ids) > max_length:
            raise UserError(f"{where}: {text!r} is {len(ids)} tokens long, the model has {max_length}")
    return encoded
