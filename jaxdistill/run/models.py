"""Teacher, student and tokenizer of a run, loaded from where its settings say, and checked to go together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS, rouge
from jaxdistill.models import hub, stored, transformers_5
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.layer_choice import half, resolve_layers
from jaxdistill.models.model import Model, build_model_for, common_words, init_params, param_shapes
from jaxdistill.models.narrow import Sizes, narrow_config, resolve_sizes
from jaxdistill.models.pair import Pair, mix_of
from jaxdistill.models.partition import check_heads
from jaxdistill.models.settings import HOW_MADE, StudentConfig, TeacherConfig
from jaxdistill.models.student import cut_student, student_config
from jaxdistill.models.tokenizer import (
    check_same_vocabulary,
    check_tokenizer,
    end_texts_alike,
    has_tokenizer,
    load_tokenizer,
)
from jaxdistill.models.weights import open_params
from jaxdistill.run import folder as folders
from jaxdistill.run import teacher_cache
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes


class StudentChoice(NamedTuple):
    """A student before its parameters."""

    model: Model
    layers: tuple[int, ...] | None  # the teacher layers that it is cut from
    folder: Path | None  # the folder that it is read from


class OtherTeacher(NamedTuple):
    """A teacher beside the first one."""

    name: str
    model: Model
    folder: Path
    params: PyTree  # {} where they are not read


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
            _check_same_kind(one.model, pair.student)
        teacher_cache.check_words(config, cached, pair.student)
        return pair._replace(teacher=None, cached=cached, mix=mix_of(config.teacher))
    teacher, teacher_params = load_teacher(config, allow_pickle=allow_pickle)
    others = [_other_teacher(config, name, allow_pickle=allow_pickle) for name in config.teacher.also]
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
    choice = _student_model(config.student, teacher, allow_pickle=allow_pickle)
    check_model(config, choice.model, "student")
    _check_same_kind(teacher, choice.model)
    if unused := _unused(config.student, choice):
        report(f"config.student.name={config.student.name} is taken as it is, without config.student.{unused}")
    params = _student_params(
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
        _check_same_words(teacher, choice, tokenizer)
        for other in others:
            _check_same_kind(other.model, choice.model)
            _check_other_teacher(teacher, other, tokenizer)
            check_tokenizer(tokenizer, other.model.config)
        teachers = (teacher, *(other.model for other in others))
        if {one.vocab_size for one in teachers} != {choice.model.vocab_size}:
            sizes = ", ".join(f"{one.vocab_size:,}" for one in teachers)
            whose, those = ("teachers' vocabularies have", "all") if others else ("teacher's vocabulary has", "both")
            report(
                f"the {whose} {sizes} entries and the student's {choice.model.vocab_size:,}, with the same tokenizer: "
                f"the losses on logits are over the {common_words(choice.model, *teachers):,} that {those} have"
            )
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


def pair_of_shapes(config: Config) -> Pair:
    """As `load_pair`, with shapes in place of parameters and without a tokenizer; no weights are read.

    Raises:
      UserError: as `load_pair`.
    """
    cached = teacher_cache.cached_teachers(config)[0] if config.teacher.caches else None
    teacher = cached.model if cached else _teacher_model(config.teacher, allow_pickle=False, weights=False)[0]
    others = [_other_teacher(config, name, allow_pickle=False, weights=False) for name in config.teacher.also]
    choice = _student_model(config.student, teacher, allow_pickle=False, weights=False)
    check_model(config, choice.model, "student")
    if teacher is not None:
        check_model(config, teacher, "teacher")
        _check_same_kind(teacher, choice.model)
        if teacher.vocab_size != choice.model.vocab_size:
            _check_same_words(teacher, choice, _tokenizer(config, choice))
        for other in others:
            if teacher.vocab_size != other.model.vocab_size:
                _check_other_teacher(teacher, other, _tokenizer(config, choice))
            _check_same_kind(other.model, choice.model)
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


def load_teacher(config: Config, *, allow_pickle: bool) -> tuple[Model | None, PyTree]:
    """The teacher and its parameters, which are read later (models/stored.py); (None, {}) where there is none."""
    teacher, folder = _teacher_model(config.teacher, allow_pickle=allow_pickle)
    if teacher is None or folder is None:
        return None, {}
    check_model(config, teacher, "teacher")  # before its weights are read
    return teacher, open_params(folder, teacher, allow_pickle=allow_pickle)


def _other_teacher(config: Config, name: str, *, allow_pickle: bool, weights: bool = True) -> OtherTeacher:
    """A teacher of config.teacher.also, with parameters that are read later, if at all."""
    settings = config.teacher.model_copy(update={"name": name, "revision": ""})
    model, folder = _teacher_model(settings, allow_pickle=allow_pickle, weights=weights)
    assert model is not None and folder is not None, "config.check lets no empty name pass"
    check_model(config, model, f"teacher {name}")
    return OtherTeacher(name, model, folder, open_params(folder, model, allow_pickle=allow_pickle) if weights else {})


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


def check_model(config: Config, model: Model, role: str) -> None:
    """Checks that settings are for this kind of model, and that rows fit it; needs neither tokenizer nor weights.

    Raises:
      UserError: the first setting that does not fit.
    """
    check_heads(model, config.mesh.tensor, role)
    c, kind = config, "causal" if model.family.causal else "masked"
    who = f"the {role} is a {model.config.model_type}, a {kind} language model"
    if c.data.max_length > model.max_length:
        raise UserError(
            f"config.data.max_length={c.data.max_length} is longer than the {role}'s {model.max_length} positions; "
            "lower it"
        )
    if not model.family.causal and c.samples:
        raise UserError(f"{who}, which writes no text; set config.sample and config.loss.alpha_policy to 0")
    if model.family.causal and c.loss.tokens == "masked":
        raise UserError(f"{who}, which masks nothing; set config.loss.tokens to all, or to labels")
    if not model.family.causal and c.data.prompt_column:
        raise UserError(f"{who}, and config.data.prompt_column={c.data.prompt_column!r} is for causal ones")
    for name in c.evaluate.metrics:
        if EVALUATORS[name].kind not in ("", kind):
            raise UserError(f"{who}, and {name} in config.evaluate.metrics is for {EVALUATORS[name].kind} ones")
    if "rouge" in c.evaluate.metrics:
        if not (c.data.prompt_column or c.data.prepared):
            raise UserError("rouge in config.evaluate.metrics scores completions; name config.data.prompt_column")
        rouge.check_installed()


def _check_same_kind(teacher: Model | None, model: Model) -> None:
    if teacher is not None and teacher.family.causal != model.family.causal:
        kinds = [f"{one.config.model_type} ({'causal' if one.family.causal else 'masked'})" for one in (teacher, model)]
        raise UserError(f"teacher {kinds[0]} and student {kinds[1]}: both must be masked, or both causal")


def _check_other_teacher(first: Model, other: OtherTeacher, tokenizer: Any) -> None:
    """Checks that a further teacher has the words of the first one, as a student that is read from a folder must."""
    tokenizers = [tokenizer, load_tokenizer(other.folder)] if has_tokenizer(other.folder) else []
    check_same_vocabulary(first.config, other.model.config, tokenizers, of=("the teacher", f"the teacher {other.name}"))


def _check_same_words(teacher: Model, choice: StudentChoice, tokenizer: Any) -> None:
    if choice.folder is None:  # its words are those of the run's tokenizer
        tokenizers = [tokenizer]
    elif has_tokenizer(choice.folder):
        tokenizers = [tokenizer, load_tokenizer(choice.folder)]
    else:
        tokenizers = []
    check_same_vocabulary(teacher.config, choice.model.config, tokenizers)


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


def _teacher_model(
    settings: TeacherConfig, *, allow_pickle: bool, weights: bool = True
) -> tuple[Model | None, Path | None]:
    if not settings.name:
        return None, None
    folder = hub.resolve(settings.name, revision=settings.revision, allow_pickle=allow_pickle, weights=weights)
    return build_model_for(hub.load_config(folder), settings), folder


def _student_model(
    settings: StudentConfig, teacher: Model | None, *, allow_pickle: bool, weights: bool = True
) -> StudentChoice:
    """The student's start, in this order: another run, a Hugging Face folder, random numbers, the teacher."""
    s = settings
    if s.name:
        folder = Path(s.name) / "student"
        if not hub.is_run(s.name):
            folder = hub.resolve(s.name, revision=s.revision, allow_pickle=allow_pickle, weights=weights)
        return StudentChoice(build_model_for(hub.load_config(folder), s), None, folder)
    overrides = dict(s.overrides or {})
    if s.init == "random":
        base = _config_from_scratch(overrides, s.family) if teacher is None else teacher.config
        family = overrides.pop("model_type", s.family or base.model_type)
        own = student_config(base, family=family, layers=(), overrides=overrides)
        return StudentChoice(build_model_for(own, s), None, None)
    assert teacher is not None, "config.check lets no run without any start pass"
    depth, period = teacher.num_layers, teacher.period
    by_importance = s.init == "importance"
    usual = f"first:{depth}" if by_importance else half(of=depth, period=period)
    layers = resolve_layers(usual if s.layers is None else s.layers, of=depth, period=period)
    family = s.family or teacher.config.model_type
    whole = narrow_config(teacher, narrower_sizes(s, teacher)) if by_importance else teacher.config
    cut = student_config(whole, family=family, layers=layers, overrides=overrides)
    return StudentChoice(build_model_for(cut, s), layers, None)


def narrower_sizes(settings: StudentConfig, teacher: Model) -> Sizes:
    """The sizes of a student that is cut by importance.

    Raises:
      UserError: no model can have them, or they are larger than the teacher's.
    """
    try:
        return resolve_sizes(teacher, width=settings.width, inner=settings.inner, heads=settings.heads)
    except UserError as error:
        raise UserError(f"config.student.width, inner and heads: {error}") from error


def _unused(settings: StudentConfig, choice: StudentChoice) -> str:
    """The settings, as `family=distilbert`, that say how a student is made, and are not used as it is read."""
    if choice.folder is None:
        return ""
    default = StudentConfig()
    given = {name: getattr(settings, name) for name in HOW_MADE}
    if given["family"] == choice.model.config.model_type:
        del given["family"]
    return ", ".join(f"{name}={value}" for name, value in given.items() if value != getattr(default, name))


def _student_params(
    config: Config,
    choice: StudentChoice,
    teacher: Model | None,
    teacher_params: PyTree,
    *,
    allow_pickle: bool,
    missing: Literal["error", "init"],
    report: Callable[[str], None],
) -> PyTree:
    key = jax.random.key(config.seed)
    if choice.layers is not None and config.student.init == "importance":
        return param_shapes(choice.model)  # until the teacher is scored on the text: run/importance.py
    if choice.layers is not None:
        assert teacher is not None
        return cut_student(
            teacher_params,
            teacher=teacher,
            student=choice.model,
            layers=choice.layers,
            reference_init=config.student.reference_init,
            key=key,
        )
    if choice.folder is None:
        return init_params(choice.model, key)
    if hub.is_run(config.student.name):
        # To the host, as they lie on one device and the run's state may lie on others.
        return jax.device_get(folders.load_student(Path(config.student.name), report=report).params)
    return open_params(choice.folder, choice.model, allow_pickle=allow_pickle, missing=missing, key=key)


def _config_from_scratch(overrides: dict[str, Any], family: str) -> Any:
    from transformers import AutoConfig

    kind = overrides.get("model_type", family)
    if kind not in FAMILIES:
        raise UserError(
            f"config.student.overrides needs a model_type, one of {', '.join(FAMILIES)}; it has {kind or None!r}"
        )
    transformers_5.check_class("config.student.overrides", kind)
    return AutoConfig.for_model(kind)
