"""A run from a Python program, with losses and functions of its own, and figures of any model."""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from jaxtyping import Array, Float

from jaxdistill.api.arguments import check_flag, check_function, name_of, texts_of
from jaxdistill.api.models import LanguageModel, Named, load, loaded
from jaxdistill.api.text import Text, settings_of, write
from jaxdistill.console import say
from jaxdistill.errors import UserError
from jaxdistill.files import named_path
from jaxdistill.jobs import measure
from jaxdistill.losses.objective import OwnLoss
from jaxdistill.losses.term import Signals, Term
from jaxdistill.losses.terms import TERMS
from jaxdistill.models import hub
from jaxdistill.models.settings import SIZES
from jaxdistill.recipe import with_settings
from jaxdistill.run import checkpoint, loop, mirror, resume
from jaxdistill.run.best import step_named
from jaxdistill.run.hooks import Hooks
from jaxdistill.run.records import read_records
from jaxdistill.run.stop import Interrupted, Stop

# Called with the step and its figures. Where it returns True, the run saves a checkpoint and stops.
OnFigures = Callable[[int, dict[str, float]], object]
# Called with the step and the folder of a checkpoint that is whole.
OnCheckpoint = Callable[[int, Path], object]
LossFunction = Callable[[Signals], Float[Array, "..."]]
Seen = Literal["logits", "hidden_states", "attentions"]
_SEEN: tuple[str, ...] = get_args(Seen)


class Loss(NamedTuple):
    """A loss of the program's own.

    `function` gets the Signals of a batch (jaxdistill/losses/term.py): `student` and `teacher` with their `logits`,
    `hidden_states` and `attentions`, and the `labels`. It returns a value for each token, in the shape of `labels`; the
    mask and the mean are applied to it as to every other loss. It must be a function of these arrays alone, written in
    JAX, as it is compiled and differentiated.
    """

    function: LossFunction
    weight: float = 1.0
    sees: Seen = "logits"  # the arrays that the models must return for it
    needs_teacher: bool = True


class Run(NamedTuple):
    """A run that was trained, or stopped by a callback."""

    workdir: Path
    figures: dict[str, float]  # of the last evaluation
    stopped: bool = False  # by a callback; the same call goes on

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All records of training ("kind": "train") and of evaluations ("eval"): rows for pandas.DataFrame."""
        return read_records(self.workdir)

    @property
    def student(self) -> LanguageModel:
        """The student of the last checkpoint."""
        return load(self.workdir)


def distil(
    *,
    workdir: Named,
    teacher: LanguageModel | Named | None = None,
    student: LanguageModel | Named | None = None,
    text: Text | None = None,
    held_out: Text | None = None,
    column: str = "text",
    prompt_column: str = "",
    config: Any = None,
    settings: Mapping[str, Any] | None = None,
    losses: Mapping[str, Loss | tuple[LossFunction, float]] | None = None,
    on_step: OnFigures | None = None,
    on_evaluation: OnFigures | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    allow_pickle: bool = False,
) -> Run:
    """Trains a student, or goes on from the last checkpoint in `workdir`.

    Args:
      workdir: folder of the run, or its address (gs://, s3://).
      teacher, student: models, or their names; None = as the config says. A student that was cut is cut again by the
        run, from the same teacher.
      text: path, or texts in memory, which are kept in the run folder: a list, a pandas series or frame, a
        datasets.Dataset; or pairs (prompt, completion) for a causal model.
      held_out: as `text`; None holds out a part of the text.
      column, prompt_column: the columns of a frame or a data set.
      config: a recipe, as for `jaxdistill train --config`, or a config that a recipe returns; None = the defaults.
      settings: values by dotted key that come after the config: {"train.steps": 100}. docs/settings.md lists all.
      losses: losses of the program's own, by name: a Loss, or (function, weight) for one that sees logits.
      on_step: called with every record of training, each `log.every` steps, one step late.
      on_evaluation: called after every evaluation.
      on_checkpoint: called after every checkpoint. Where one of the three returns True, the run saves a checkpoint
        after the step that it is at, and stops.
      allow_pickle: whether a pytorch_model.bin may be read, with torch's weights_only.

    Raises:
      UserError: what does not fit, in one line that says what to do.
    """
    folder, own = _folder(workdir), _own_losses({} if losses is None else losses)
    check_flag("allow_pickle", allow_pickle)
    for name, function in {"on_step": on_step, "on_evaluation": on_evaluation}.items():
        if function is not None:
            check_function(name, function, "the step", "its figures")
    if on_checkpoint is not None:
        check_function("on_checkpoint", on_checkpoint, "the step", "the folder of the checkpoint")
    of_text, files = settings_of(
        text, held_out=held_out, column=column, prompt_column=prompt_column, folder=folder / "text"
    )
    chosen = {**_models(teacher, student), **of_text, **_given(settings)}
    made = with_settings(config, chosen, own_losses=bool(own))
    if not made.teacher.name and (alone := [name for name, loss in own.items() if loss.row.needs_teacher]):
        raise UserError(
            f"losses[{alone[0]!r}] needs a teacher, and there is none; name one, or say needs_teacher=False"
        )
    mirror.fetch(folder)
    resume.began_with(made, folder)  # raises for a folder of another run, before text is put there
    write(files)
    stop = Stop()
    hooks = Hooks(own, _recorded(on_step, on_evaluation, stop), _saved(on_checkpoint, folder, stop))
    try:
        return Run(folder, loop.run(made, folder, allow_pickle=allow_pickle, stop=stop, hooks=hooks))
    except Interrupted as stopped:
        say(str(stopped))
        return Run(folder, checkpoint.last_notes(folder)["figures"], stopped=True)


def evaluate(
    student: LanguageModel | Named,
    text: Text | None = None,
    *,
    teacher: LanguageModel | Named | None = None,
    metrics: Sequence[str] | None = None,
    column: str = "text",
    prompt_column: str = "",
    config: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The figures of a model on a text, and those of a teacher beside it.

    Args:
      student: a model, or its name. A run is measured on its own held-out text and with its own settings, unless other
        ones are given.
      text, column, prompt_column: the held-out text, as for `distil`.
      metrics: some of perplexity, agreement, pseudo_perplexity and rouge; None = those of the config.
      config, settings: as for `distil`.

    Raises:
      UserError: what does not fit.
    """
    metrics = None if metrics is None else texts_of("metrics", metrics)
    model = loaded(student)
    with tempfile.TemporaryDirectory() as folder:
        of_text, files = settings_of(
            text, held_out=text, column=column, prompt_column=prompt_column, folder=Path(folder)
        )
        write(files)
        chosen = {**(_models(teacher, None) if teacher is not None else {}), **of_text, **_given(settings)}
        if config is None and model.layers is None and hub.is_run(model.place.name):
            workdir = named_path(model.place.name)
            made = with_settings(measure.config_of_run(workdir, ()), chosen)
            step = step_named(workdir, model.place.step)
            return measure.evaluate_run(
                workdir, made, step=step, metrics=metrics, allow_pickle=model.allow_pickle, report=say
            )
        made = with_settings(config, {**_models(teacher, model), **of_text, **_given(settings)})
        return measure.evaluate_config(made, str(model), metrics=metrics, allow_pickle=model.allow_pickle, report=say)


def _given(settings: Any) -> Mapping[str, Any]:
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"settings is of type {type(settings).__name__}; give a dictionary, {{'train.steps': 100}}")
    if strange := [key for key in settings or {} if not isinstance(key, str)]:
        raise UserError(f"settings has the key {strange[0]!r}; give dotted keys, {{'train.steps': 100}}")
    return settings or {}


def _folder(workdir: Named) -> Path:
    """The folder of a run, or the mirror of its address."""
    try:
        return named_path(str(mirror.folder(name_of("workdir", workdir))))
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from error


def _models(teacher: LanguageModel | Named | None, student: LanguageModel | Named | None) -> dict[str, Any]:
    """The settings that name the models."""
    settings: dict[str, Any] = {}
    if teacher is not None:
        place = _place(teacher, "teacher")
        settings |= {"teacher.name": place[0], "teacher.revision": place[1]}
    if isinstance(student, LanguageModel) and student.layers is not None:
        of = (student.place.name, student.place.revision)
        if teacher is not None and _place(teacher, "teacher") != of:
            raise UserError(
                f"the student is cut from {of[0]}, and the teacher is {_place(teacher, 'teacher')[0]}; export one"
            )
        return settings | {
            "teacher.name": of[0],
            "teacher.revision": of[1],
            "student.name": "",
            "student.init": "teacher",
            "student.layers": student.layers,
            "student.family": student.family,
            **dict.fromkeys((f"student.{size}" for size in SIZES), 0),
        }
    if student is not None:
        place = _place(student, "student")
        settings |= {"student.name": place[0], "student.revision": place[1]}
    return settings


def _place(model: LanguageModel | Named, role: str) -> tuple[str, str]:
    """(name, revision) of a model that a run can read by itself."""
    if not isinstance(model, LanguageModel):
        return name_of(role, model), ""
    if model.layers is not None or model.place.step != "last":
        raise UserError(f"the {role} is {model}, which has no folder of its own; export it, and name that folder")
    return model.place.name, model.place.revision


def _own_losses(losses: Any) -> dict[str, OwnLoss]:
    if not isinstance(losses, Mapping):
        raise UserError(f"losses is of type {type(losses).__name__}; give a dictionary, {{name: (function, weight)}}")
    own = {}
    for name, given in losses.items():
        if not isinstance(name, str) or not name.isidentifier() or name in TERMS or name in _FIGURES:
            raise UserError(f"losses holds {name!r}: a name must be a Python name that no other figure of a run has")
        loss = _loss(f"losses[{name!r}]", given)
        own[name] = OwnLoss(_row(f"losses[{name!r}]", loss), float(loss.weight))
    return own


def _loss(name: str, given: Any) -> Loss:
    loss = Loss(*given) if isinstance(given, tuple) and 1 <= len(given) <= len(Loss._fields) else None
    if loss is None:
        raise UserError(f"{name} is {given!r}; give (function, weight), or a jaxdistill.Loss")
    check_function(name, loss.function, "the Signals of a batch")
    if not isinstance(loss.weight, int | float) or not 0 < loss.weight < float("inf"):
        raise UserError(f"{name} has the weight {loss.weight!r}; it must be a number above 0")
    if loss.sees not in _SEEN:
        raise UserError(f"{name} sees {loss.sees!r}; a loss sees one of {', '.join(_SEEN)}")
    return loss


_FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "input_wait", "layers", "step", "time", "kind")


def _row(name: str, loss: Loss) -> Term:
    tokens = "head" if loss.sees == "logits" else "tokens"

    def per_token(objective: Any, signals: Signals) -> Any:
        values, shape = loss.function(signals), signals.masks[tokens].shape
        if (found := getattr(values, "shape", ())) != shape:
            raise UserError(f"{name} returns the shape {found}; it must return one value for each token: {shape}")
        return values

    return Term(
        "A loss of the program's own.",
        tokens=tokens,
        sees=loss.sees,
        per_token=per_token,
        every_layer=True,
        needs_teacher=loss.needs_teacher,
    )


def _recorded(
    on_step: OnFigures | None, on_evaluation: OnFigures | None, stop: Stop
) -> Callable[[int, str, Mapping[str, float]], None]:
    called = {"train": on_step, "eval": on_evaluation}

    def record(step: int, kind: str, figures: Mapping[str, float]) -> None:
        if (call := called.get(kind)) is not None and call(step, dict(figures)) is True:
            stop.asked = "a callback"

    return record


def _saved(on_checkpoint: OnCheckpoint | None, workdir: Path, stop: Stop) -> Callable[[int], None] | None:
    if on_checkpoint is None:
        return None

    def saved(step: int) -> None:
        if on_checkpoint(step, mirror.place_of(workdir) / checkpoint.FOLDER / str(step)) is True:
            stop.asked = "a callback"

    return saved
