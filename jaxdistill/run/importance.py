"""A student that is cut out of its teacher by importance: the teacher is scored on text, and then made narrower."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.console import taking
from jaxdistill.data import text as texts
from jaxdistill.data.batching import HostBatch
from jaxdistill.data.pipeline import Hosts
from jaxdistill.data.text import Text
from jaxdistill.evaluate import importance
from jaxdistill.evaluate.context import Context
from jaxdistill.evaluate.evaluator import make_context
from jaxdistill.models import stored
from jaxdistill.models.model import Model, build_model
from jaxdistill.models.narrow import Scores, Sizes, full_sizes, narrow, narrow_config
from jaxdistill.models.pair import Pair
from jaxdistill.models.student import cut_student
from jaxdistill.run.models import is_made, student_in_memory
from jaxdistill.run.students import narrower_sizes
from jaxdistill.run.teachers import load_teacher
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes

ROWS_AT_ONCE = 32


def with_student(config: Config, pair: Pair, text: Text, meshes: Meshes, *, allow_pickle: bool) -> Pair:
    """The pair with the parameters of a student that is cut by importance; a pair that has parameters as it is.

    The teacher is scored on the first rows of the training text, in float32 and from its files, so that the student is
    the same whatever data type the run's teacher is kept in, and again when the run is resumed.
    """
    teacher, student, layers = pair.teacher, pair.student, pair.layers
    if is_made(pair.student_params):
        return pair
    assert teacher is not None and layers is not None, "only what is cut has no parameters yet"
    _, params = load_teacher(config, allow_pickle=allow_pickle)
    model = build_model(teacher.config, attention=teacher.attention, classes=teacher.classes)
    with taking("scoring the teacher's channels, units and heads"):
        batches = first_rows(config, text, rows=config.student.score_rows)
        scores = importance.score(*to_score(config, model, params, pair.tokenizer, text, batches, meshes.teacher))
    made, params = narrowed(model, params, scores, narrower_sizes(config.student, model))
    params = cut_student(
        params,
        teacher=made,
        student=student,
        layers=layers,
        reference_init=config.student.reference_init,
        key=jax.random.key(config.seed),
    )
    return student_in_memory(pair._replace(student_params=params), meshes)


def kept_sizes(config: Config, pair: Pair) -> dict[str, int]:
    """The sizes of a student that is cut by importance; {} of any other."""
    is_narrower = config.student.init == "importance" and pair.layers is not None
    return full_sizes(pair.student)._asdict() if is_narrower else {}


def first_rows(config: Config, text: Text, *, rows: int) -> Sequence[HostBatch]:
    """Batches of the first rows of the training text, always with the same masks, drawn whatever the words are."""
    return texts.held_out_batches(
        text._replace(held_out=text.train),
        config.data,
        config.mask.model_copy(update={"smoothing": 0.0}),
        batch_size=ROWS_AT_ONCE,
        limit=-(-rows // ROWS_AT_ONCE),
        hosts=Hosts(jax.process_index(), jax.process_count()),
    )


def to_score(
    config: Config,
    model: Model,
    params: PyTree,
    tokenizer: Any,
    text: Text,
    batches: Sequence[HostBatch],
    mesh: Mesh,
) -> tuple[Context, PyTree]:
    """What scores a model on batches of a text, and its parameters on the devices."""
    pair = Pair(model, params, None, {}, tokenizer, None)
    context = make_context(config.evaluate, config.mask, pair, text, batches, mesh=mesh)
    return context, stored.placed(params, sharding.by_rule(params, mesh, family=model.family), jnp.float32)


def narrowed(model: Model, params: PyTree, scores: Scores, sizes: Sizes) -> tuple[Model, PyTree]:
    """The model cut to smaller sizes, and its parameters."""
    made = build_model(narrow_config(model, sizes), dtype=model.dtype, attention=model.attention, classes=model.classes)
    return made, narrow(params, model, scores, sizes)
