"""A teacher's answers on a batch, computed on the devices in the form that a cache keeps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxdistill.data.teacher_cache import Meta
from jaxdistill.losses.divergences import log_softmax
from jaxdistill.losses.fused_head import chunk_size
from jaxdistill.losses.partial import best_words, draw_words, floor_of, log_tail
from jaxdistill.models import intercept
from jaxdistill.models.head import Head, logits, over_words
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.model import Model
from jaxdistill.models.positions import gather_tokens, head_positions
from jaxdistill.models.scan import layer_interceptors
from jaxdistill.step import sharding

# (teacher_params, batch) -> arrays [rows places ...] by the names of data.teacher_cache.columns_of
Answer = Callable[[PyTree, Mapping[str, Array]], dict[str, Array]]

_SEED = 0  # of all draws, which depend on an example's key and a token's place in it besides


def make_answer(
    teacher: Model, meta: Meta, *, capacity: Callable[[int], int] | None, mesh: Any, shardings: PyTree
) -> Answer:
    """The jitted function that computes a batch's answers, its rows split over all devices.

    The batch has, beside the arrays of any batch, `example` (uint32: the start of the key of each token's example) and
    `place` (int32: the token's place in it). So what is drawn depends on content alone, and a cache that was stopped
    and gone on with is the same as one that was not. Logits are made for a few tokens of every row at a time.

    Args:
      capacity: row length -> places for the predicted tokens of a row, which alone go through the head; None = the
        places are all tokens.
      shardings: of the teacher's parameters.
    """

    def answer(params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
        example, place, positions = batch["example"], batch["place"], None
        if capacity is not None:
            mask = batch["label_mask"]
            positions, _ = head_positions(mask, group=1, capacity=capacity(mask.shape[1]))
            example, place = (gather_tokens(x, positions) for x in (example, place))
        outputs = intercept.apply(
            teacher,
            params,
            Inputs(batch["input_ids"], batch["attention_mask"], batch.get("segment_ids")),
            asked=Asked(hidden_states=bool(meta.layers)),
            positions=positions,
            interceptors=layer_interceptors(teacher),
            mesh=mesh,
        )
        head = over_words(intercept.head_of(teacher, params), meta.words)
        keys = jax.vmap(jax.vmap(_key_of))(example, place)
        hidden = {f"hidden_{i}": outputs.hidden_states[i].astype(jnp.bfloat16) for i in meta.layers}
        assert outputs.features is not None
        return _of_features(head, outputs.features, keys, meta, mesh) | hidden

    rows = sharding.by_batch(mesh)
    return jax.jit(answer, in_shardings=(shardings, rows), out_shardings=rows)


def _key_of(example: Array, place: Array) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), example), place)


def _of_features(head: Head, features: Array, keys: Array, meta: Meta, mesh: Any) -> dict[str, Array]:
    rows, places = keys.shape
    chunk = chunk_size(tokens=max(1, rows * places // mesh.size), platform=mesh.devices.flat[0].platform)
    width = min(max(chunk * mesh.size // rows, 1), places)
    pieces = -(-places // width)

    def cut(x: Array) -> Array:
        """[rows places ...] -> [pieces rows width ...]; the last piece is filled up with what is dropped again."""
        filled = x[:, jnp.minimum(jnp.arange(pieces * width), places - 1)]
        return jnp.moveaxis(filled.reshape(rows, pieces, width, *x.shape[2:]), 1, 0)

    found = jax.lax.map(
        lambda piece: _of_logits(logits(head._replace(features=piece[0])), piece[1], meta), (cut(features), cut(keys))
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, pieces * width, *x.shape[3:])[:, :places], found)


def _of_logits(values: Array, keys: Array, meta: Meta) -> dict[str, Array]:
    """The answers of tokens [rows width], of their logits [rows width vocab]."""
    answers, words = {}, None
    if meta.k:
        _, words = best_words(values.astype(jnp.float32), meta.k)
        log_p = jnp.take_along_axis(log_softmax(values, 1.0), words, axis=-1)
        tails = [log_tail(values, words, temperature=t) for t in meta.temperatures]
        # float16 ends at -65,504, and a word that the teacher rules out has -inf.
        log_p = jnp.maximum(log_p, -60_000.0) if meta.values == "float16" else log_p
        answers = {"words": words, "log_probs": log_p.astype(meta.values), "tails": jnp.stack(tails, axis=-1)}
    if meta.samples:
        drawn, floors = [], []
        for i, t in enumerate(meta.temperatures):
            own = jax.vmap(jax.vmap(lambda key, i=i: jax.random.fold_in(key, i)))(keys)
            drawn.append(draw_words(own, values, words, temperature=t, count=meta.samples))
            floors.append(floor_of(values, words, temperature=t))
        answers |= {"samples": jnp.stack(drawn, axis=-2), "floors": jnp.stack(floors, axis=-1).astype("float16")}
    return answers
