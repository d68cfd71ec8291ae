"""The most likely words for a mask token, as a person would try out a model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxdistill.data.prompts import framed_ids
from jaxdistill.errors import UserError
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import Model

PROMPTS = "config.evaluate.prompts"


def fill_mask(
    model: Model, params: PyTree, tokenizer: Any, texts: Sequence[str], *, top: int = 5, where: str = PROMPTS
) -> list[list[tuple[str, float]]]:
    """The `top` words and their probabilities for the first mask token of every text.

    Args:
      where: as for `encode_prompts`.

    Raises:
      UserError: as `encode_prompts`.
    """
    results = []
    for encoded in encode_prompts(tokenizer, texts, max_length=model.max_length, where=where):
        ids = jnp.asarray(encoded)[None]
        masked = jnp.flatnonzero(ids[0] == tokenizer.mask_token_id)
        logits = intercept.apply(model, params, Inputs(ids, jnp.ones_like(ids, bool))).logits
        best, words = jax.lax.top_k(jax.nn.softmax(logits[0, masked[0]].astype(jnp.float32)), top)
        results.append([(tokenizer.decode([int(w)]).strip(), float(p)) for w, p in zip(words, best, strict=True)])
    return results


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
