"""The loss of relations between whole models: padding and packing change nothing, and the student alone learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.losses import terms
from jaxdistill.losses.objective import make_objective
from jaxdistill.models.pair import Pair
from jaxdistill.step.forward import Distillation, loss_fn

OFF = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_clm": 0.0, "alpha_cos": 0.0}
ALONE = {**OFF, "alpha_relation": 1.0, "relation_heads": 2, "relation_layer": 0, "relation_weights": (1.0, 0.5, 0.0)}


def pair_of(kind, **student):
    return Pair(tiny.model(kind, **student), {}, tiny.model(kind), {}, None, None)


def distillation_of(kind, student=None, **loss):
    config = Config().changed(loss={**ALONE, **loss})
    pair = pair_of(kind, **(student or tiny.depth(kind, 1)))
    return Distillation(pair.student, pair.teacher, make_objective(config.loss, config.policy, pair), 1, lambda n: n)


def batch_of(ids, mask, segments=None):
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": ids, "label_mask": mask}
    return {name: jnp.asarray(x) for name, x in (arrays | ({"segment_ids": segments} if segments else {})).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padding_and_packing_change_nothing(kind):
    """Two short rows, and the same text with padding between and after, or packed into one row."""
    distillation = distillation_of(kind)
    teacher = tiny.params(kind)
    student = jax.tree.map(lambda x: 0.7 * x, tiny.params(kind, **tiny.depth(kind, 1)))  # else the teacher's own
    texts = np.random.default_rng(0).integers(5, 101, (2, 5)).astype(np.int32)
    plain = batch_of(texts, np.ones((2, 5), bool))
    padded = batch_of(np.pad(texts, ((0, 0), (0, 4)), constant_values=1), np.arange(9)[None].repeat(2, 0) < 5)
    batches = [plain, padded]
    if kind != "bert":  # rows of a masked LM are one document
        packed = batch_of(np.pad(texts.reshape(1, 10), ((0, 0), (0, 2))), np.arange(12)[None] < 10)
        batches.append({**packed, "segment_ids": jnp.asarray([[0] * 5 + [1] * 5 + [0] * 2], jnp.int32)})

    def value(params, batch):
        counts = terms.token_counts(terms.masks_of(distillation.objective, batch))
        return loss_fn({"student": params, "projections": {}}, teacher, batch, counts, distillation)[0]

    of_plain, *others = [jax.jit(jax.value_and_grad(value))(student, batch) for batch in batches]
    assert of_plain[0] > 1e-3
    for other in others:
        for left, right in zip(*map(jax.tree.leaves, (of_plain, other)), strict=True):
            np.testing.assert_allclose(left, right, atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"relation_heads": 3}, ["relation_heads=3", "16 and 16", "1, 2, 4, 8, 16"]),
        ({"relation_layer": 2}, ["relation_layer=2", "layers 0 to 1"]),
    ],
)
def test_what_does_not_fit_is_refused(changed, words):
    with pytest.raises(UserError) as error:
        distillation_of("bert", **changed)
    assert all(word in str(error.value) for word in words)


def test_layer_drop_and_weights_are_refused():
    from jaxdistill.config import check

    start = Config().changed(teacher={"name": "folder"}, data={"path": "text"})
    check(start.changed(loss=ALONE))
    for changed, word in [
        ({"loss": ALONE, "student": {"layer_drop": 0.1}}, "alpha_relation"),
        ({"loss": {**ALONE, "relation_weights": (0.0, 0.0, 0.0)}}, "relation_weights"),
        ({"loss": {**ALONE, "relation_weights": (1.0, float("nan"), 0.0)}}, "relation_weights"),
    ]:
        with pytest.raises(UserError, match=word):
            check(start.changed(**changed))
