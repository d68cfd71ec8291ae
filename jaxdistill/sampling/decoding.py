"""How the next token is chosen: settings, mixtures of models, truncation, drawing, and the stop at repetitions."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdistill.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when a row is finished."""

    max_new_tokens: int = 100
    temperature: float = 0.0  # 0: the likeliest token (the first of equally likely ones)
    top_k: int = 0  # draw among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the fewest tokens that have this probability together
    repeat_ngram: int = 0  # a row stops where its last n new tokens ...
    repeat_times: int = 0  # ... occur this many times among its new tokens (overlaps count); 0: never
    end_ids: tuple[int, ...] = ()  # a row stops with any of these tokens
    pad_id: int = 0  # fills a row after its end


def check_decoding(decoding: Decoding) -> None:
    """Raises UserError for a value that is out of range, or would have no effect."""
    d = decoding
    if d.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {d.max_new_tokens}; it must be at least 1")
    if not 0 <= d.temperature < float("inf"):
        raise UserError(f"temperature is {d.temperature:g}; it must be 0 (the likeliest token) or more, and finite")
    if d.top_k < 0:
        raise UserError(f"top_k is {d.top_k}; it must be at least 1, or 0 for all tokens")
    if not 0 < d.top_p <= 1:
        raise UserError(f"top_p is {d.top_p:g}; it must be above 0 and at most 1")
    if d.temperature == 0 and (d.top_k or d.top_p < 1):
        raise UserError("top_k and top_p choose what is drawn from, and at temperature 0 nothing is: raise temperature")
    if (d.repeat_ngram or d.repeat_times) and not (d.repeat_ngram >= 1 and d.repeat_times >= 2):
        raise UserError(
            f"a repetition stop needs n-grams of at least 1 token and at least 2 times; it has {d.repeat_ngram} and "
            f"{d.repeat_times}"
        )


def mix(
    logits: Sequence[Float[Array, "batch vocab"]], *, weights: Sequence[float], temperature: float
) -> Float[Array, "batch vocab"]:
    """The logits z with softmax(z / T) = sum_i weights_i softmax(logits_i / T); those of a single model are unchanged.

    Truncation and drawing at T then work as for one model. At temperature 0, which takes the likeliest token, T is 1.
    """
    if len(logits) == 1:
        return logits[0]
    at = temperature or 1.0
    logs = [
        jax.nn.log_softmax(x.astype(jnp.float32) / at) + math.log(weight)
        for x, weight in zip(logits, weights, strict=True)
    ]
    return at * functools.reduce(jnp.logaddexp, logs)


def choose(
    logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"], *, decoding: Decoding
) -> Int[Array, "batch"]:
    """A token a row: the likeliest, or one drawn from softmax(logits / temperature), truncated and renormalised."""
    logits = logits.astype(jnp.float32)
    if decoding.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = truncate(logits / decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def truncate(logits: Float[Array, "batch vocab"], *, top_k: int, top_p: float) -> Float[Array, "batch vocab"]:
    """Sets the logits of tokens that are not drawn to -inf: first all but the k likeliest, then all but the nucleus.

    The nucleus (Holtzman et al. 2020) of the remaining tokens is the smallest set whose probabilities sum to at least
    top_p, in order of probability. Tokens that tie with the last token kept are kept.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def repeated(
    tokens: Int[Array, "batch new"], count: int | Int[Array, ""], *, ngram: int, times: int
) -> Bool[Array, "batch"]:
    """Whether the last `ngram` of the first `count` tokens occur at least `times` times among these; ngram 0: never."""
    rows, new = tokens.shape
    if not 0 < ngram <= new:
        return jnp.zeros(rows, bool)
    last = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(count - ngram, 0), ngram, axis=1)
    starts = new - ngram + 1
    same = [tokens[:, i : i + starts] == last[:, i : i + 1] for i in range(ngram)]
    whole = jnp.arange(starts) + ngram <= count
    return jnp.sum(jnp.all(jnp.stack(same), axis=0) & whole[None, :], axis=1) >= times
