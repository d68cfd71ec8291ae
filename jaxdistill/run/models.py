"""Teacher, student and tokenizer of a run, loaded from where its settings say, and checked to go together."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.models import hub, stored
from jaxdistill.models.model import Model, common_words, param_shapes
from jaxdistill.models.pair import Pair, mix_of
from jaxdistill.models.tokenizer import check_tokenizer, end_texts_alike, load_tokenizer
from jaxdistill.run import teacher_cache
from jaxdistill.run.fit import check_model, check_same_kind
from jaxdistill.run.students import StudentChoice, check_same_words, choose_student, student_params, unused_settings
from jaxdistill.run.teachers import OtherTeacher, check_other_teacher, load_teacher, other_teacher, teacher_model
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes


def load_pair(
    config: Config, *, allow_pickle: bool, report: Callable[[str], None], meshes: Meshes | None = None
) -> Pair:
    """Loads the teacher, makes the student, and checks that both, and the tokenizer, go together.

    A student that is cut by importance has shapes in place of parameters (run/importance.py makes them).

    Args:
      meshes: what holds the parameters, split over its devices; None = the host, in NumPy.

    Raises:
      UserError: what does not fit; before any text is read and anything is compiled.
    """
    if config.teacher.caches:
        cached, *others = teacher_cache.cached_teachers(config)
        for one in (cached, *others):
            check_model(config, one.model, "teacher")
        pair = pair_with(config, cached.model, {}, allow_pickle=allow_pickle, report=report, meshes=meshes)
        for one in others:
            check_same_kind(one.model, pair.student)
        teacher_cache.check_words(config, cached, pair.student)
        return pair._replace(teacher=None, cached=cached, mix=mix_of(config.teacher))
    teacher, teacher_params = load_teacher(config, allow_pickle=allow_pickle)
    others = [other_teacher(config, name, allow_pickle=allow_pickle) for name in config.teacher.also]
    pair = pair_with(
        config, teacher, teacher_params, allow_pickle=allow_pickle, report=report, meshes=meshes, others=others
    )
    return pair._replace(mix=mix_of(config.teacher))


def pair_with(
    config: Config,
    teacher: Model | None,
    teacher_params: PyTree,
    *,
    allow_pickle: bool,
    report: Callable[[str], None],
    missing: Literal["error", "init"] = "init",
    meshes: Meshes | None = None,
    others: Sequence[OtherTeacher] = (),
) -> Pair:
    """As `load_pair`, with a teacher from `load_teacher`.

    Args:
      missing: "error" refuses a folder of config.student.name that lacks a head, which "init" draws.
      others: the teachers of config.teacher.also, where they are to be run.

    Raises:
      UserError: as `load_pair`.
    """
    choice = choose_student(config.student, teacher, allow_pickle=allow_pickle)
    check_model(config, choice.model, "student")
    check_same_kind(teacher, choice.model)
    if unused := unused_settings(config.student, choice):
        report(f"config.student.name={config.student.name} is taken as it is, without config.student.{unused}")
    params = student_params(
        config, choice, teacher, teacher_params, allow_pickle=allow_pickle, missing=missing, report=report
    )
    tokenizer = _tokenizer(config, choice)
    for one in (teacher, choice.model):
        if one is not None:
            check_tokenizer(tokenizer, one.config)
    if choice.model.family.causal:
        if teacher is None and choice.folder is None:
            choice.model.config.eos_token_id = None  # of the configuration class, which knows no tokenizer
        configs = [one.config for one in (teacher, choice.model) if one is not None]
        end_texts_alike(tokenizer, *configs)
    if tokenizer.mask_token_id is None and not choice.model.family.causal:
        raise UserError("the tokenizer has no mask token; masked-LM training needs one")
    if teacher is not None:
        check_same_words(teacher, choice, tokenizer)
        for other in others:
            check_same_kind(other.model, choice.model)
            check_other_teacher(teacher, other, tokenizer)
        _say_common_words((teacher, *(other.model for other in others)), choice.model, report)
    pair = Pair(
        choice.model,
        params,
        teacher,
        teacher_params,
        tokenizer,
        choice.layers,
        others=tuple(other.model for other in others),
        others_params=tuple(other.params for other in others),
    )
    return in_memory(pair, config.teacher.dtype, meshes)


def _say_common_words(teachers: Sequence[Model], student: Model, report: Callable[[str], None]) -> None:
    """Reports over which words the losses are where vocabularies are padded to unlike sizes."""
    if {one.vocab_size for one in teachers} == {student.vocab_size}:
        return
    sizes = ", ".join(f"{one.vocab_size:,}" for one in teachers)
    several = len(teachers) > 1
    subject, models = ("teachers' vocabularies have", "all") if several else ("teacher's vocabulary has", "both")
    report(
        f"the {subject} {sizes} entries and the student's {student.vocab_size:,}, with the same tokenizer: the losses "
        f"on logits are over the {common_words(student, *teachers):,} that {models} have"
    )


def pair_of_shapes(config: Config) -> Pair:
    """As `load_pair`, with shapes in place of parameters and without a tokenizer; no weights are read.

    Raises:
      UserError: as `load_pair`.
    """
    cached = teacher_cache.cached_teachers(config)[0] if config.teacher.caches else None
    teacher = cached.model if cached else teacher_model(config.teacher, allow_pickle=False, weights=False)[0]
    others = [other_teacher(config, name, allow_pickle=False, weights=False) for name in config.teacher.also]
    choice = choose_student(config.student, teacher, allow_pickle=False, weights=False)
    check_model(config, choice.model, "student")
    if teacher is not None:
        check_model(config, teacher, "teacher")
        check_same_kind(teacher, choice.model)
        if teacher.vocab_size != choice.model.vocab_size:
            check_same_words(teacher, choice, _tokenizer(config, choice))
        for other in others:
            check_same_kind(other.model, choice.model)
            if teacher.vocab_size != other.model.vocab_size:
                check_other_teacher(teacher, other, _tokenizer(config, choice))
    dtype = jnp.dtype(config.teacher.dtype)
    runs = teacher if cached is None else None

    def shapes_of(model: Model) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), param_shapes(model))

    return Pair(
        choice.model,
        param_shapes(choice.model),
        runs,
        {} if runs is None else shapes_of(runs),
        None,
        choice.layers,
        cached,
        others=tuple(other.model for other in others),
        others_params=tuple(shapes_of(other.model) for other in others),
        mix=mix_of(config.teacher),
    )


def in_dtype(params: PyTree, dtype: str) -> PyTree:
    """Parameters on the host in the data type they are kept in: a teacher is not trained, so bfloat16 will do."""
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)


def in_memory(pair: Pair, teacher_dtype: str, meshes: Meshes | None) -> Pair:
    """The pair with the parameters read that still lie in files, one after the other.

    Args:
      meshes: as of `load_pair`.
    """
    if meshes is None:
        teacher_params = in_dtype(pair.params_of_teachers, teacher_dtype)
    else:
        of_teacher = sharding.of_teacher(pair, meshes.teacher)
        teacher_params = stored.placed(pair.params_of_teachers, of_teacher, jnp.dtype(teacher_dtype))
    return student_in_memory(pair.with_params_of_teachers(teacher_params), meshes)


def student_in_memory(pair: Pair, meshes: Meshes | None) -> Pair:
    """As `in_memory`, of the student alone; parameters that are not made yet stay shapes."""
    params = pair.student_params
    if not is_made(params):
        return pair
    if meshes is None:
        return pair._replace(student_params=stored.on_host(params))
    shardings = sharding.by_rule(params, meshes.student, family=pair.student.family)
    return pair._replace(student_params=stored.placed(params, shardings, jnp.float32))


def is_made(params: PyTree) -> bool:
    """Whether parameters are arrays, and not their shapes."""
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def _tokenizer(config: Config, choice: StudentChoice) -> Any:
    if config.tokenizer.name:
        folder = hub.resolve(config.tokenizer.name, revision=config.tokenizer.revision, weights=False)
    elif config.teacher.caches:
        folder = teacher_cache.teacher_folder(config.teacher.caches[0])
    elif config.teacher.name:
        folder = hub.resolve(config.teacher.name, revision=config.teacher.revision, weights=False)
    else:
        assert choice.folder is not None, "config.check lets no run without a name for a tokenizer pass"
        folder = choice.folder
    return load_tokenizer(folder)
