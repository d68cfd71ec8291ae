"""What the student of a run is made from: looked up when the run begins, kept in its folder, stated by its card."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pydantic

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.export.origin import Origin, Source
from jaxdistill.files import named_path
from jaxdistill.losses.objective import NO_LOSSES, OwnLoss
from jaxdistill.losses.terms import TERMS
from jaxdistill.models import hub
from jaxdistill.models.model_card import card_facts, is_hub_name
from jaxdistill.run import folder as folders
from jaxdistill.run import teacher_cache


def origin_of(
    config: Config,
    *,
    layers: tuple[int, ...] | None,
    sizes: Mapping[str, int] = MappingProxyType({}),
    own: Mapping[str, OwnLoss] = NO_LOSSES,
) -> Origin:
    """What a run of this config makes its student from.

    Args:
      layers: the teacher layers that the student is cut from; None where it is not cut.
      sizes: of a student that is cut to smaller ones.
      own: the losses of a Python program.
    """
    rows = [TERMS[name] for name in config.losses] + [loss.row for loss in own.values()]
    learns = bool(config.sample.teacher) or any(row.needs_teacher for row in rows)
    teachers = _teachers(config)
    teacher = teachers[0] if teachers else None
    start = source_named(config.student.name, config.student.revision) if config.student.name else None
    is_cut = layers is not None
    made = {"start": start, "is_cut": is_cut, "layers": layers or (), "sizes": dict(sizes)}
    if teacher is not None and learns:
        return Origin(how="distilled", teacher=teacher, also=tuple(teachers[1:]), **made)
    return Origin(how="fine-tuned" if start or is_cut else "trained", teacher=teacher if is_cut else None, **made)


def _teachers(config: Config) -> list[Source]:
    """The teachers that the config names; or those whose answers are read, which need not be on this machine."""
    named = [(config.teacher.name, config.teacher.revision)] if config.teacher.name else []
    sources = [source_named(*one) for one in (*named, *((name, "") for name in config.teacher.also))]
    recorded = teacher_cache.recorded_teachers(config)[len(sources) :]  # the first cache is of the teacher with a name
    return sources + [Source(name=one.name or "a teacher", base_models=_on_hub(one.name)) for one in recorded]


def source_named(name: str, revision: str = "") -> Source:
    """A model that a config names, with what its card, or its run folder, says of it."""
    if hub.is_run(name):
        origin = read_origin(named_path(name))
        return Source(name=name, licence=origin.licence, base_models=tuple(origin.base_models))
    facts = card_facts(name, revision=revision)
    return Source(name=name, licence=facts.licence, base_models=(name,) if is_hub_name(name) else facts.base_models)


def read_origin(workdir: Path, config: Mapping[str, Any] | None = None) -> Origin:
    """What stands in a run folder; of a run that began before it was kept there, what its config names.

    Args:
      config: of the run, as JSON; None where nothing but origin.json counts.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / folders.ORIGIN
    if path.is_file():
        try:
            return Origin.model_validate_json(path.read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            raise UserError(f"{path} is damaged: take it from a copy of the run folder, or remove it") from error
    if config is None:
        return Origin(how="trained")
    teacher, student = config["teacher"]["name"], config["student"]
    start = Source(name=student["name"], base_models=_on_hub(student["name"])) if student["name"] else None
    if teacher:
        source = Source(name=teacher, base_models=_on_hub(teacher))
        is_cut = not start and student["init"] != "random"
        return Origin(how="distilled", teacher=source, start=start, is_cut=is_cut)
    return Origin(how="fine-tuned" if start else "trained", start=start)


def _on_hub(name: str) -> tuple[str, ...]:
    return (name,) if is_hub_name(name) else ()
