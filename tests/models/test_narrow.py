"""Narrower models: every index is used alike in all parameters, what is dead can go, and sizes are checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill.errors import UserError
from jaxdistill.evaluate import importance
from jaxdistill.models import narrow as narrowing
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.inputs import Asked, Inputs
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import build_model, param_shapes
from jaxdistill.models.narrow import Kept, Scores, Sizes, full_sizes, narrow, narrow_config, resolve_sizes, take

RNG = np.random.default_rng(0)


def logits(model, params, kind):
    rows = Inputs(*(jnp.asarray(x) for x in tiny.batch(kind)))
    run = jax.jit(lambda params: apply(model, params, rows).logits, compiler_options=tiny.QUICK)
    return np.asarray(run(params))[np.asarray(rows.attention_mask)]


def layers_of(model):
    paths = flatten_dict(param_shapes(model), sep="/")
    return sorted({layer for path in paths if (layer := narrowing.layer_of(path, model.family))})


def scores_of(model, params, kind):
    ids, mask = tiny.batch(kind, rows=4)
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}
    sums = jax.jit(functools.partial(importance._sums, model), compiler_options=tiny.QUICK)(params, batch)
    return importance._scores(model, jax.device_get(sums))


@pytest.mark.parametrize("kind", tiny.families(FAMILIES, weekly=True))
def test_another_order_is_the_same_model(kind):
    """All channels, units and heads, shuffled: so each is at the same place wherever it is used."""
    model, params = tiny.model(kind), tiny.params(kind)
    full, groups = full_sizes(model), narrowing._key_heads(model)

    def heads():
        if groups == full.heads:
            return RNG.permutation(full.heads)
        each = full.heads // groups
        return np.concatenate([RNG.permutation(each) + i * each for i in range(groups)])

    layers = layers_of(model)
    inner = {layer: RNG.permutation(full.inner) for layer in layers}
    kept = Kept(RNG.permutation(full.width), inner, {layer: heads() for layer in layers})
    shuffled = take(params, model, kept)
    before: dict = flatten_dict(params, sep="/")
    assert all(shuffled[path].shape == before[path].shape for path in before)
    changed = [path for path in before if not np.array_equal(shuffled[path], before[path])]
    assert len(changed) > len(before) / 2
    shuffled = unflatten_dict(shuffled, sep="/")
    np.testing.assert_allclose(logits(model, shuffled, kind), logits(model, params, kind), atol=2e-4)


@pytest.mark.parametrize("kind", tiny.families(FAMILIES, weekly=True))
def test_a_narrower_model_has_the_shapes_of_its_configuration(kind):
    model, params = tiny.model(kind), tiny.params(kind)
    size, heads = narrowing.head_size(model.config), model.config.num_attention_heads
    width = 12 if narrowing._own_heads(model) else size
    if kind == "electra":  # whose embeddings are as wide as one head, which is no size to cut to
        with pytest.raises(UserError, match="no projection"):
            resolve_sizes(model, width=size)
        model, params = tiny.model(kind, embedding_size=6), tiny.params(kind, embedding_size=6)
    sizes = resolve_sizes(model, width=width, inner=10, heads=heads // 2)
    scores = scores_of(model, params, kind)
    same = narrow(params, model, scores, full_sizes(model))
    jax.tree.map(np.testing.assert_array_equal, same, params)  # cutting nothing
    made = build_model(narrow_config(model, sizes))
    cut = narrow(params, model, scores, sizes)
    assert jax.tree.map(np.shape, cut) == jax.tree.map(np.shape, param_shapes(made))
    assert full_sizes(made) == sizes == Sizes(width, 10, heads // 2)
    assert np.isfinite(logits(made, cut, kind)).all()


@pytest.mark.parametrize("kind", tiny.families(k for k in ("llama", "gemma", "gemma2", "qwen3", "phi3", "granite")))
def test_what_is_dead_can_go(kind):
    """Channels that are zero everywhere, and units and heads that nothing reads."""
    own = {"rms_norm_eps": 1e-12}
    model, params = tiny.model(kind, **own), tiny.params(kind, **own)
    full, size = full_sizes(model), narrowing.head_size(model.config)
    channels, units = np.array([0, 5, 11, 15]), np.arange(3, 17)
    dead = {"channels": channels, "inner": units, "heads": np.r_[size : 2 * size, 2 * size : 3 * size]}

    def silenced(path, array):
        array = np.array(array)
        for axis, roles in enumerate(narrowing.roles_of(path, array.ndim, model)):
            # What writes into a dead channel, and what reads a dead unit or head.
            is_input = axis == 0 and path.endswith("kernel")
            if roles == ("channels",) and not is_input:
                array[(slice(None),) * axis + (dead["channels"],)] = 0
            if is_input and roles[0] and roles in (("inner",), ("heads",)):
                array[dead[roles[0]]] = 0
        return array

    flat: dict = {path: silenced(path, array) for path, array in flatten_dict(params, sep="/").items()}
    params = unflatten_dict(flat, sep="/")
    scores = scores_of(model, params, kind)

    # What nothing reads may still be large; the test says what is least.
    def low(by_layer, at):
        return {path: np.where(np.isin(np.arange(len(x)), at), -1.0, x) for path, x in by_layer.items()}

    scores = scores._replace(inner=low(scores.inner, units), heads=low(scores.heads, [1, 2]))
    assert (scores.channels[channels] <= np.delete(scores.channels, channels).min()).all()
    sizes = Sizes(full.width - 4, full.inner - len(units), full.heads - 2)
    made = build_model(narrow_config(model, sizes))
    cut = narrow(params, model, scores, sizes)
    np.testing.assert_allclose(logits(made, cut, kind), logits(model, params, kind), atol=2e-4)


def test_heads_are_ranked_inside_of_the_group_of_a_key_head():
    scores = np.array([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    np.testing.assert_array_equal(narrowing.best_heads(scores, 4, groups=2), [0, 1, 4, 5])
    np.testing.assert_array_equal(narrowing.best_heads(scores, 4, groups=6), [0, 1, 2, 4])


@pytest.mark.slow
def test_scores_are_those_of_the_formula_and_padding_has_none():
    """Of BERT's first layer by hand, from the activations that torch's names stand for."""
    model, params = tiny.model("bert"), tiny.params("bert")
    ids, mask = tiny.batch("bert", rows=4)
    found = scores_of(model, params, "bert")
    assert isinstance(found, Scores)
    inputs = Inputs(jnp.asarray(ids), jnp.asarray(mask))
    states = apply(model, params, inputs, asked=Asked(hidden_states=True)).hidden_states
    layer = params["bert"]["encoder"]["layer"]["1"]
    # The last norm of the body gives the last hidden states.
    rows = [np.abs(np.asarray(states[-1][i])[mask[i]]).mean(axis=0) for i in range(4)]
    of_norm = np.sqrt(np.square(rows).sum(axis=0))
    assert (found.channels > of_norm).all()
    sums = importance._sums(model, params, {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)})
    last = sums["channels"]["bert/encoder/layer/1/output/LayerNorm"]
    np.testing.assert_allclose(np.sqrt(last), of_norm, rtol=1e-5)
    energy = sums["energy"]["bert/encoder/layer/1/output/LayerNorm"]
    scale, bias = (layer["output"]["LayerNorm"][name] for name in ("scale", "bias"))
    normed = (np.asarray(states[-1])[mask] - bias) / scale
    np.testing.assert_allclose(
        energy / energy.mean(), np.square(normed).sum(0) / np.square(normed).sum(0).mean(), rtol=1e-3
    )


@pytest.mark.parametrize(
    ("kind", "asked", "words"),
    [
        ("bert", {"width": 12}, ["width 12 and 1 heads", "8 entries", "a width of 8 with 1 heads"]),
        ("bert", {"width": 8, "heads": 2}, ["width 8 and 2 heads"]),
        ("bert", {"inner": 25}, ["inner 25", "24"]),
        ("bert", {"width": -8}, ["width -8"]),
        ("llama", {"heads": 3}, ["3 heads", "share 2 key heads", "multiple of 2"]),
    ],
)
def test_sizes_that_cannot_be(kind, asked, words):
    with pytest.raises(UserError) as error:
        resolve_sizes(tiny.model(kind), **asked)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sizes_follow_each_other():
    assert resolve_sizes(tiny.model("bert"), width=8) == resolve_sizes(tiny.model("bert"), heads=1) == Sizes(8, 24, 1)
    assert resolve_sizes(tiny.model("llama"), width=10) == Sizes(10, 24, 4)
