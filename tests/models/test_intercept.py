"""Gathering before the head is gathering after it; padding is not seen; the model is pure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.positions import gather_tokens, head_positions

CAUSAL = [kind for kind, family in FAMILIES.items() if family.causal]
jitted_positions = jax.jit(head_positions, static_argnames=("group", "capacity"))


@given(arrays(bool, (4, 3)), st.sampled_from([(1, 3), (2, 2), (2, 6), (4, 5)]))
@settings(max_examples=60, deadline=None)
def test_head_positions_are_the_labelled_ones_in_order(mask, sizes):
    group, capacity = sizes
    groups = len(mask) // group
    positions, valid = jitted_positions(jnp.asarray(mask), group=group, capacity=capacity)
    assert positions.shape == valid.shape == (groups, capacity)
    for row, ok, flat in zip(positions, valid, mask.reshape(groups, -1), strict=True):
        expected = np.flatnonzero(flat)[:capacity]
        np.testing.assert_array_equal(row[ok], expected)
        assert ok.sum() == len(expected)


def test_gather_tokens_indexes_flattened_groups():
    x = np.arange(4 * 3 * 2).reshape(4, 3, 2)
    positions = np.array([[5, 0], [1, 3]])
    got = gather_tokens(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_array_equal(got, [[x[1, 2], x[0, 0]], [x[2, 1], x[3, 0]]])


@pytest.mark.parametrize("kind", tiny.families(FAMILIES, fast=("bert",), weekly=True))
def test_gather_before_the_head_is_gather_after(kind):
    depth = tiny.depth(kind, 2 if kind == "albert" else 1)
    model, params = tiny.model(kind, **depth), tiny.params(kind, **depth)
    ids, mask = (jnp.asarray(array) for array in tiny.batch(kind, rows=4))
    labels = mask & (np.random.default_rng(3).random(mask.shape) < 0.3)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, model.vocab_size)), jnp.float32)

    def loss(params, before):
        positions, valid = head_positions(labels, group=2, capacity=6)
        out = apply(model, params, Inputs(ids, mask), positions=positions if before else None)
        logits = out.logits if before else gather_tokens(out.logits, positions)
        assert logits.shape == (2, 6, model.vocab_size)
        # Summed over labelled tokens, so that a gradient entry is of order one.
        return jnp.sum(jax.nn.log_softmax(logits) * weights * valid[:, :, None]), logits

    before, after = (
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1, compiler_options=tiny.QUICK)(params, flag)
        for flag in (True, False)
    )
    np.testing.assert_allclose(before[0][1], after[0][1], atol=1e-5)
    for left, right in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5 * max(1.0, float(jnp.abs(right).max())))
    assert any(float(jnp.abs(leaf).max()) > 0.1 for leaf in jax.tree.leaves(after[1]))


@pytest.mark.parametrize("kind", tiny.families(FAMILIES, fast=["bert"], weekly=True))
def test_padded_tokens_are_not_seen(kind):
    model, params = tiny.model(kind), tiny.params(kind)
    ids, mask = tiny.batch(kind)
    pad = model.config.pad_token_id
    other = np.where(mask, ids, 7)
    assert (ids[~mask] == pad).all() and not mask.all()

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def run(ids):
        return apply(model, params, Inputs(ids, jnp.asarray(mask))).logits

    np.testing.assert_allclose(run(jnp.asarray(ids))[mask], run(jnp.asarray(other))[mask], atol=1e-6)
    # and a real token is
    other = ids.copy()
    if model.family.causal:
        other[:, -2] = 7
        assert np.abs(run(jnp.asarray(ids))[:, -1] - run(jnp.asarray(other))[:, -1]).max() > 1e-3
    else:
        other[:, 1] = 7
        assert np.abs(run(jnp.asarray(ids))[:, 0] - run(jnp.asarray(other))[:, 0]).max() > 1e-3


@pytest.mark.parametrize("kind", tiny.families(CAUSAL, weekly=True))
@pytest.mark.slow
def test_padding_on_either_side_changes_nothing(kind):
    """Left, right or none: the same logits, hidden states and attention maps at the real tokens."""
    model, params = tiny.model(kind), tiny.params(kind)
    ids = np.random.default_rng(5).integers(5, 101, (1, 6)).astype(np.int32)

    def run(left, right):
        width = ((0, 0), (left, right))
        rows, mask = np.pad(ids, width, constant_values=9), np.pad(np.ones_like(ids, bool), width)
        out = apply(
            model,
            params,
            Inputs(jnp.asarray(rows), jnp.asarray(mask)),
            asked=Asked(hidden_states=True, attentions=True),
        )
        real = slice(left, left + 6)
        return [
            out.logits[:, real],
            *(x[:, real] for x in out.hidden_states),
            *(x[:, :, real, real] for x in out.attentions),
        ]

    alone = run(0, 0)
    assert len(alone) == 1 + 3 + 2
    for padded in (run(3, 0), run(0, 3), run(1, 2)):
        for x, y in zip(alone, padded, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.families(CAUSAL, weekly=True))
def test_no_token_sees_a_later_one(kind):
    """The gradient of a token's logits by the input embeddings is exactly 0 at later tokens, not at earlier ones."""
    model, params = tiny.model(kind), tiny.params(kind)
    ids = jnp.arange(10, 16)[None]  # each token once, so that an embedding row is a position
    path = model.family.embedding.split("/")

    def of_logits(params, place):
        out = apply(model, params, Inputs(ids, jnp.ones_like(ids, bool)), asked=Asked(hidden_states=True))
        # Hidden states after the final norm, not logits: a tied head would add gradients of the whole table.
        return jnp.sum(out.hidden_states[-1][0, place] * jnp.arange(1, model.width + 1))

    grads = jax.jit(jax.vmap(jax.grad(of_logits), (None, 0)), compiler_options=tiny.QUICK)(params, jnp.arange(6))
    table = functools.reduce(lambda tree, name: tree[name], path, grads)  # [place, vocabulary, width]
    moved = np.abs(table[:, 10:16]).max(-1) > 0
    np.testing.assert_array_equal(moved & ~np.tri(6, dtype=bool), False)
    assert moved.diagonal().all() and moved[5, 4]  # and windows of 3 hide no neighbour
    assert not np.abs(table[:, :10]).any()


def packed_row() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(ids, segments, documents): four documents of distinct tokens, one of them a single token, and padding."""
    parts = np.split(np.random.default_rng(6).permutation(np.arange(10, 24)), [5, 6, 9])
    ids = np.concatenate([*parts, [9, 9]]).astype(np.int32)
    segments = np.concatenate([*(np.full(len(x), i + 1) for i, x in enumerate(parts)), [0, 0]]).astype(np.int32)
    return ids, segments, parts


@pytest.mark.parametrize("kind", tiny.families(CAUSAL, weekly=True))
@pytest.mark.slow
def test_documents_packed_in_a_row_are_each_alone(kind):
    """The same logits as in a row of its own, hidden states and attention maps as well."""
    model, params = tiny.model(kind), tiny.params(kind)
    ids, segments, parts = packed_row()
    alone = np.full((len(parts), len(ids)), 9, np.int32)
    for row, part in zip(alone, parts, strict=True):
        row[: len(part)] = part
    mask = np.arange(len(ids)) < np.array([[len(part)] for part in parts])

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def run(ids, mask, segments):
        out = apply(model, params, Inputs(ids, mask, segments), asked=Asked(hidden_states=True, attentions=True))
        return jnp.concatenate([out.logits, *out.hidden_states], axis=-1), jnp.stack(out.attentions)

    # Two rows, the second padded on the left: segments are those of each row, and not of the first.
    both = np.stack([ids, np.roll(ids, 2)]), np.stack([segments, np.roll(segments, 2)])
    packed, maps = run(both[0], both[1] > 0, both[1])
    single, single_maps = run(alone, mask, None)
    for row in range(2):
        for i, part in enumerate(parts):
            (places,) = np.nonzero(both[1][row] == i + 1)
            np.testing.assert_allclose(packed[row, places], single[i, : len(part)], atol=1e-5)
            here = maps[:, row][:, :, places]
            np.testing.assert_allclose(here[..., places], single_maps[:, i, :, : len(part), : len(part)], atol=1e-5)
            # All of the attention stays within the document.
            np.testing.assert_allclose(here[..., places].sum(-1), 1, atol=1e-5)
    # Without their numbers they do see one another.
    mixed, _ = run(both[0], both[1] > 0, None)
    assert np.abs(mixed[0, 5:14] - packed[0, 5:14]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.families(CAUSAL, weekly=True))
def test_no_gradient_leaves_a_document_or_comes_from_later_tokens(kind):
    """Of the logits at every place by the input embeddings at every place, in a packed row: exactly 0 but for the
    document's own earlier tokens and itself."""
    model, params = tiny.model(kind, tie_word_embeddings=False), tiny.params(kind, tie_word_embeddings=False)
    ids, segments, _ = packed_row()
    path = model.family.embedding.split("/")
    weights = np.random.default_rng(7).normal(size=101).astype(np.float32)

    def of_logits(params, place):
        out = apply(
            model, params, Inputs(jnp.asarray(ids)[None], jnp.asarray(segments > 0)[None], jnp.asarray(segments)[None])
        )
        return jnp.sum(out.logits[0, place] * weights)

    real = np.flatnonzero(segments)
    grads = jax.jit(jax.vmap(jax.grad(of_logits), (None, 0)), compiler_options=tiny.QUICK)(params, real)
    table = functools.reduce(lambda tree, name: tree[name], path, grads)  # [place, vocabulary, width]
    moved = np.abs(table[:, ids[real]]).max(-1) > 0
    same = segments[real][:, None] == segments[real][None, :]
    np.testing.assert_array_equal(moved & ~(same & np.tri(len(real), dtype=bool)), False)
    assert moved.diagonal().all() and moved[real[1:], real[:-1]][same[real[1:], real[:-1]]].all()
    others = np.setdiff1d(np.arange(101), ids[real])
    assert not np.abs(table[:, others]).any()


def test_dropout_needs_a_key_and_follows_it():
    model, params = tiny.model("bert"), tiny.params("bert")
    ids, mask = (jnp.asarray(array) for array in tiny.batch("bert"))

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def run(key):
        return apply(model, params, Inputs(ids, mask, dropout_key=key)).logits

    first, again, second = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - second).max()) > 1e-3


@pytest.mark.slow
def test_vmap_over_parameters():
    model = tiny.model("distilbert")
    params = tiny.params("distilbert")
    stacked = jax.tree.map(lambda x: np.stack([x, 2 * x]), params)
    ids, mask = (jnp.asarray(array) for array in tiny.batch("distilbert"))

    def run(params):
        return apply(model, params, Inputs(ids, mask)).logits

    both = jax.vmap(run)(stacked)
    np.testing.assert_allclose(both[0], run(params), atol=1e-5)
    np.testing.assert_allclose(both[1], run(jax.tree.map(lambda x: 2 * x, params)), atol=1e-4)


def test_further_interceptors_are_run():
    """The seam for LayerDrop: one that skips layer 1 gives the one-layer model's hidden states."""
    model, params = tiny.model("bert"), tiny.params("bert")
    ids, mask = (jnp.asarray(array) for array in tiny.batch("bert"))

    def skip(next_call, args, kwargs, context):
        if "/".join(context.module.path) == model.family.layers.format(1) and context.method_name == "__call__":
            return (args[0],)
        return next_call(*args, **kwargs)

    skipped = apply(model, params, Inputs(ids, mask), asked=Asked(hidden_states=True), interceptors=[skip])
    plain = apply(model, params, Inputs(ids, mask), asked=Asked(hidden_states=True))
    assert skipped.hidden_states is not None and plain.hidden_states is not None
    np.testing.assert_array_equal(skipped.hidden_states[2], plain.hidden_states[1])
    assert float(jnp.abs(skipped.logits - plain.logits).max()) > 1e-3
