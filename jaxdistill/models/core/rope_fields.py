"""Rotary positions as configurations write them: the fields of transformers 4 and those of 5 give equal settings."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdistill.models.core.reader import Reader
from jaxdistill.models.core.rope import Linear, Llama3, Rope, Yarn

FULL, SLIDING = "full_attention", "sliding_attention"


class Ropes(NamedTuple):
    """The rotary positions of layers that see everything, and of those with a window."""

    full: Rope
    sliding: Rope


def read_ropes(
    read: Reader,
    head_size: int,
    *,
    theta: str = "rope_theta",
    local_theta: str = "",
    scaled: tuple[str, ...] = (FULL, SLIDING),
) -> Ropes:
    """Reads `rope_parameters`, nested by kind of layer or not, where they are given, else the fields of transformers 4.

    Args:
      theta: the field of transformers 4 that holds the base of the frequencies.
      local_theta: the same for layers with a window; "" = those have the base of the others.
      scaled: the kinds of layers whose positions `rope_scaling` stretches.
    """
    old_theta = read.value(theta, 10_000.0)
    scaling, new = _mapping(read, "rope_scaling"), _mapping(read, "rope_parameters")
    base = {FULL: old_theta, SLIDING: read.value(local_theta, old_theta) if local_theta else old_theta}
    by_kind = {kind: {"rope_theta": base[kind], **(scaling if kind in scaled else {})} for kind in base}
    if set(new) & {FULL, SLIDING}:
        by_kind |= {kind: new[kind] for kind in (FULL, SLIDING) if new.get(kind)}
    elif new:
        own = {} if local_theta else {"rope_theta": new.get("rope_theta", old_theta)}
        by_kind = {kind: {**by_kind[kind], **own, **(new if kind in scaled else {})} for kind in by_kind}
    partial = read.number("partial_rotary_factor", 1.0)
    positions = read.integer("max_position_embeddings")
    ropes = {kind: _rope(read, fields, head_size, partial, positions) for kind, fields in by_kind.items()}
    return Ropes(ropes[FULL], ropes[SLIDING])


def _mapping(read: Reader, name: str) -> Mapping[str, Any]:
    given = read.value(name, {})
    if not isinstance(given, Mapping):
        raise read.refusal(f"{name} is {given!r}; it must hold fields by name")
    return given


def _rope(read: Reader, fields: Mapping[str, Any], head_size: int, partial: float, positions: int) -> Rope:
    if not isinstance(fields, Mapping):
        raise read.refusal(f"rope_parameters holds {fields!r}; it must hold fields by name")
    inner = Reader(f"{read.where}, rotary positions", fields)
    name = "rope_type" if "rope_type" in fields else "type"
    inner.pass_over("type", "rope_type")  # transformers 4 writes both, and they are equal
    scaling = _SCALINGS[inner.word(name, tuple(_SCALINGS), "default")](inner, positions)
    size = int(head_size * inner.number("partial_rotary_factor", partial))
    if size % 2 or not 0 < size <= head_size:
        raise read.refusal(f"{size} of the {head_size} entries of a head are rotated; it must be an even number")
    rope = Rope(theta=inner.number("rope_theta"), size=size, scaling=scaling)
    inner.finish()
    return rope


def _linear(read: Reader, positions: int) -> Linear:
    return Linear(read.number("factor"))


def _llama3(read: Reader, positions: int) -> Llama3:
    return Llama3(
        factor=read.number("factor"),
        low=read.number("low_freq_factor"),
        high=read.number("high_freq_factor"),
        original=read.number("original_max_position_embeddings"),
    )


def _yarn(read: Reader, positions: int) -> Yarn:
    factor = read.number("factor")
    mscale, all_dim = (read.number(name, 0.0, positive=False) for name in ("mscale", "mscale_all_dim"))
    inferred = _growth(factor, mscale) / _growth(factor, all_dim) if mscale and all_dim else _growth(factor)
    return Yarn(
        factor=factor,
        original=read.number("original_max_position_embeddings", positions),
        attention_factor=read.number("attention_factor", inferred),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        truncate=read.flag("truncate", True),
    )


def _growth(factor: float, mscale: float = 1.0) -> float:
    """How much larger the scores of a longer text should be, by YaRN's section 3.4."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


# rope_type -> reads its fields. "dynamic" and "longrope" depend on the longest row of a batch, so they are no function
# of a token, and are refused.
_SCALINGS: dict[str, Callable[[Reader, int], Linear | Llama3 | Yarn | None]] = {
    "default": lambda read, positions: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
