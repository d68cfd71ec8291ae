"""The student of a run: made of layers of the teacher, of random numbers, or read from where its settings say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.models import hub, transformers_5
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.layer_choice import half, resolve_layers
from jaxdistill.models.model import Model, build_model_for, init_params, param_shapes
from jaxdistill.models.narrow import Sizes, narrow_config, resolve_sizes
from jaxdistill.models.settings import HOW_MADE, StudentConfig
from jaxdistill.models.student import cut_student, student_config
from jaxdistill.models.tokenizer import check_same_vocabulary
from jaxdistill.models.weights import open_params
from jaxdistill.run import folder as folders
from jaxdistill.run.fit import tokenizers_of


class StudentChoice(NamedTuple):
    """A student before its parameters."""

    model: Model
    layers: tuple[int, ...] | None  # the teacher layers that it is cut from
    folder: Path | None  # the folder that it is read from


def choose_student(
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


def check_same_words(teacher: Model, choice: StudentChoice, tokenizer: Any) -> None:
    """Checks that a student has the teacher's words; those of one that is made are those of the run's tokenizer.

    Raises:
      UserError: it has others.
    """
    tokenizers = [tokenizer] if choice.folder is None else tokenizers_of(tokenizer, choice.folder)
    check_same_vocabulary(teacher.config, choice.model.config, tokenizers)


def unused_settings(settings: StudentConfig, choice: StudentChoice) -> str:
    """The settings, as `family=distilbert`, that say how a student is made, and are not used as it is read."""
    if choice.folder is None:
        return ""
    default = StudentConfig()
    given = {name: getattr(settings, name) for name in HOW_MADE}
    if given["family"] == choice.model.config.model_type:
        del given["family"]
    return ", ".join(f"{name}={value}" for name, value in given.items() if value != getattr(default, name))


def student_params(
    config: Config,
    choice: StudentChoice,
    teacher: Model | None,
    teacher_params: PyTree,
    *,
    allow_pickle: bool,
    missing: Literal["error", "init"],
    report: Callable[[str], None],
) -> PyTree:
    """The parameters of a student that was chosen: shapes where importance decides on them later.

    Args:
      missing: "error" refuses a folder that lacks a head, which "init" draws.

    Raises:
      UserError: they cannot be read.
    """
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
