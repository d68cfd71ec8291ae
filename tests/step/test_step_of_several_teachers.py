"""Several teachers in a step: each of its own family and padded size, and on any mesh, as the single ones add up to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_padded_vocabulary as padded
import tiny
from test_padded_vocabulary import close

from jaxdistill.losses.term import Objective
from jaxdistill.models import intercept
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.pair import Mix, Pair
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation, teacher_outputs
from jaxdistill.step.settings import MeshConfig
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState
from jaxdistill.step.train_step import UpdateSettings, make_train_step

SHARES = (0.25, 0.75)
WEIGHTS = {"ce": 5.0, "clm": 2.0, "hidden_cos": 0.5}


@functools.cache
def models() -> tuple[Any, ...]:
    """(student, two teachers), and the parameters of each; the second teacher has fewer layers, and padded words."""
    student, first, student_params, first_params = padded.models_of("gpt2", "")
    second = tiny.model("gpt2", **tiny.depth("gpt2", 1), vocab_size=padded.PADDED)
    its = jax.tree.map(lambda x: 1.5 * np.asarray(x), tiny.params("gpt2", **tiny.depth("gpt2", 1)))
    return (student, first, second), (student_params, first_params, padded.pad(its))


def objective(combine: Any, head: str, tokens: str = "labels", divergence: str = "jsd", **weights: float) -> Objective:
    weights = weights or WEIGHTS
    return Objective(weights, 2.0, tokens, ((1, 2),), divergence, 0.3, head=head, share=0.4, mix=Mix(SHARES, combine))


def graded(aim: Objective, teachers: tuple[int, ...] = (1, 2)) -> Any:
    """((loss, means), gradient of the student)."""
    (student, *those), (params, *theirs) = models()
    chosen, given = [those[i - 1] for i in teachers], tuple(theirs[i - 1] for i in teachers)
    distillation = Distillation(student, chosen[0], aim, 2, lambda length: 16, others=chosen[1:])
    return padded.gradient(distillation, params, given if len(given) > 1 else given[0], kind="gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["labels", "uncertain"])
def test_the_mean_of_losses_is_that_of_runs_with_one_teacher_each(tokens: str) -> None:
    """Hidden states are of the first alone; of a student's most uncertain tokens, all teachers' are taken."""
    found = [graded(objective("losses", head, tokens)) for head in ("fused", "dense")]
    close(found[0], found[1])
    alone = [graded(objective("losses", "fused", tokens)._replace(mix=None, weights={"ce": 1.0}), (i,)) for i in (1, 2)]
    (_, means), _ = found[0]
    assert means["ce"] == pytest.approx(
        sum(w * one[0][1]["ce"] for w, one in zip(SHARES, alone, strict=True)), rel=1e-5
    )
    first = graded(objective("losses", "fused", tokens)._replace(mix=None), (1,))
    assert means["hidden_cos"] == pytest.approx(first[0][1]["hidden_cos"], rel=1e-6)
    (_, _), gradient = graded(objective("losses", "fused", tokens, ce=1.0))
    close(gradient, jax.tree.map(lambda a, b: SHARES[0] * a + SHARES[1] * b, alone[0][1], alone[1][1]))


@pytest.mark.slow
def test_the_mixture_is_of_the_common_words_by_hand() -> None:
    found = [graded(objective("probabilities", head, divergence="reverse_kl")) for head in ("fused", "dense")]
    close(found[0], found[1])
    batch = padded.batch_of("gpt2")

    def logits(i: int) -> np.ndarray:
        inputs = Inputs(jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]))
        values = jax.jit(lambda params: intercept.apply(models()[0][i], params, inputs).logits)(models()[1][i])
        return np.asarray(values, np.float64)[..., : padded.WORDS]

    q, *p = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in map(logits, range(3)))
    mixed = SHARES[0] * p[0] + SHARES[1] * p[1]
    values = 4 * (q * np.log(q / mixed)).sum(-1)
    assert found[0][0][1]["ce"] == pytest.approx(values[batch["label_mask"]].mean(), rel=1e-4)


@pytest.mark.slow
def test_an_update_on_a_mesh_in_micro_batches_is_that_of_one_device() -> None:
    def update(meshes: Meshes, accumulation: int) -> Any:
        (student, first, second), (params, *given) = models()
        aim = objective("probabilities", "fused", ce=5.0, clm=2.0)
        pair = Pair(
            student, params, first, given[0], None, None, others=(second,), others_params=(given[1],), mix=aim.mix
        )
        optimizer = optax.sgd(0.01)
        init = lambda p: TrainState(jnp.int32(0), {"student": p, "projections": {}}, optimizer.init(p))  # noqa: E731
        of_state = sharding.by_rule(jax.eval_shape(init, params), meshes.student, smallest=1)
        of_teachers = sharding.of_teacher(pair, meshes.teacher)
        step = make_train_step(
            Distillation(student, first, aim, 2, lambda length: 16, others=(second,)),
            optimizer,
            Placement(meshes, of_state, of_teachers),
            UpdateSettings(accumulation=accumulation, dropout=False),
        )
        names = ("input_ids", "attention_mask", "labels", "label_mask")
        batch = sharding.put_batch({name: padded.batch_of("gpt2", 16)[name] for name in names}, meshes.student)
        teachers = jax.device_put(pair.params_of_teachers, of_teachers)
        state, metrics = step(jax.jit(init, out_shardings=of_state)(params), teachers, batch, jax.random.key(0))
        return jax.device_get((state.params["student"], metrics))

    alone = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    meshes = sharding.make_meshes(MeshConfig(data=-1, fsdp=2), student=0, teacher=0)
    close(update(meshes, 1), update(Meshes(alone, alone), 2))


@pytest.mark.slow
def test_the_activations_of_one_teacher_are_there_at_a_time() -> None:
    teacher = tiny.model("gpt2")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.params("gpt2"))
    rows = {"input_ids": jnp.int32, "attention_mask": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((16, 20), dtype) for name, dtype in rows.items()}

    def temporaries(count: int) -> int:
        aim = Objective({"ce": 1.0}, 2.0, "all", (), mix=Mix((1 / count,) * count) if count > 1 else None)
        distillation = Distillation(teacher, teacher, aim, 1, lambda length: 1, others=(teacher,) * (count - 1))
        program = jax.jit(functools.partial(teacher_outputs, distillation))
        params = (shapes,) * count if count > 1 else shapes
        return program.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    kept = 16 * 20 * teacher.width * 4
    assert temporaries(4) <= temporaries(1) + 8 * kept
