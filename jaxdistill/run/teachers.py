"""The teachers of a run: the first one, and those of config.teacher.also."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxdistill.config import Config
from jaxdistill.models import hub
from jaxdistill.models.model import Model, build_model_for
from jaxdistill.models.settings import TeacherConfig
from jaxdistill.models.tokenizer import check_same_vocabulary, check_tokenizer
from jaxdistill.models.weights import open_params
from jaxdistill.run.fit import check_model, tokenizers_of


class OtherTeacher(NamedTuple):
    """A teacher beside the first one."""

    name: str
    model: Model
    folder: Path
    params: PyTree  # {} where they are not read


def load_teacher(config: Config, *, allow_pickle: bool) -> tuple[Model | None, PyTree]:
    """The teacher and its parameters, which are read later (models/stored.py); (None, {}) where there is none."""
    teacher, folder = teacher_model(config.teacher, allow_pickle=allow_pickle)
    if teacher is None or folder is None:
        return None, {}
    check_model(config, teacher, "teacher")  # before its weights are read
    return teacher, open_params(folder, teacher, allow_pickle=allow_pickle)


def other_teacher(config: Config, name: str, *, allow_pickle: bool, weights: bool = True) -> OtherTeacher:
    """A teacher of config.teacher.also, with parameters that are read later, if at all."""
    settings = config.teacher.model_copy(update={"name": name, "revision": ""})
    model, folder = teacher_model(settings, allow_pickle=allow_pickle, weights=weights)
    assert model is not None and folder is not None, "config.check lets no empty name pass"
    check_model(config, model, f"teacher {name}")
    return OtherTeacher(name, model, folder, open_params(folder, model, allow_pickle=allow_pickle) if weights else {})


def check_other_teacher(first: Model, other: OtherTeacher, tokenizer: Any) -> None:
    """Checks that a further teacher has the words of the first one, and of the run's tokenizer.

    Raises:
      UserError: what does not fit.
    """
    tokenizers = tokenizers_of(tokenizer, other.folder)
    check_same_vocabulary(first.config, other.model.config, tokenizers, of=("the teacher", f"the teacher {other.name}"))
    check_tokenizer(tokenizer, other.model.config)


def teacher_model(
    settings: TeacherConfig, *, allow_pickle: bool, weights: bool = True
) -> tuple[Model | None, Path | None]:
    """A teacher without its parameters, and the folder that has them; (None, None) where there is none."""
    if not settings.name:
        return None, None
    folder = hub.resolve(settings.name, revision=settings.revision, allow_pickle=allow_pickle, weights=weights)
    return build_model_for(hub.load_config(folder), settings), folder
