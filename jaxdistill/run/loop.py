"""A run from start to end: assemble, restore, then train, log, evaluate and save; export at the end."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import CheckpointManager

from jaxdistill import config as configs
from jaxdistill import processes
from jaxdistill.config import Config
from jaxdistill.console import say, taking
from jaxdistill.data.batching import HostBatch
from jaxdistill.errors import NotFiniteError, UserError
from jaxdistill.evaluate.evaluator import check_finite
from jaxdistill.run import checkpoint, memory, resume
from jaxdistill.run import folder as folders
from jaxdistill.run.assemble import Parts, assemble
from jaxdistill.run.best import best_line
from jaxdistill.run.closing import Closing
from jaxdistill.run.due import Due
from jaxdistill.run.export import export_run
from jaxdistill.run.hooks import Hooks
from jaxdistill.run.importance import kept_sizes
from jaxdistill.run.lock import Held, check_shared, locked
from jaxdistill.run.log import Log, Report, beside_teacher, describe, open_writers
from jaxdistill.run.origin import origin_of
from jaxdistill.run.profile import Profiler
from jaxdistill.run.prompts import lines_of, make_samples
from jaxdistill.run.stop import Interrupted, Stop
from jaxdistill.run.utilisation import rates_of
from jaxdistill.run.writers import Table, Write
from jaxdistill.step import sharding
from jaxdistill.step.across_processes import on_host
from jaxdistill.step.batch import Batch
from jaxdistill.step.state import TrainState

_DELETING = 0.5  # seconds: a folder that is being deleted loses its files one after the other, while a save fails
PROBE_ROWS = 4  # held-out rows on which an exported folder is compared with the checkpoint


def run(
    config: Config,
    workdir: Path,
    *,
    allow_pickle: bool = False,
    stop: Stop | None = None,
    hooks: Hooks = Hooks(),  # noqa: B008 - immutable
) -> dict[str, float]:
    """Trains, or goes on from the last checkpoint in `workdir`, and returns the figures of the last evaluation.

    Args:
      stop: what signals ask of the run; None = there are none.
      hooks: what a Python program adds to the run.

    Raises:
      UserError: an error that the user can fix; files written before it stay whole.
      Interrupted: the run was asked to stop, and its last step is saved.
    """
    folders.read_config(workdir)  # raises for a folder of something else, before a lock is put there
    _check_alike(config)
    is_first = processes.is_first()
    with locked(workdir) if is_first else nullcontext(Held(workdir)) as held:
        check_shared(held)
        configs.check(config, own_losses=bool(hooks.losses))
        if student := resume.finished(config, workdir, resume.began_with(config, workdir)):
            say(f"{workdir} is finished: all {student.step} steps are trained")
            figures = student.figures
        else:
            figures = _trained(config, held, hooks, allow_pickle=allow_pickle, stop=stop or Stop())
            if is_first and (line := best_line(workdir, config.checkpoint.best)):
                say(line)
        # An existing folder is whole: an earlier start of this run verified it.
        folders_to_make = {to: out for to in config.export.to if not (out := workdir / f"export-{to}").exists()}
        processes.wait("exports")
        for to, out in folders_to_make.items() if is_first else ():
            say(str(export_run(workdir, out, to=to, report=say)))
        held.check()
        processes.wait("end")
    return figures


# Settings of one host, whose values may differ between hosts, as those that name a place of the same content may.
_OF_A_HOST = ("data.cache_dir", "data.threads", "data.prefetch")


def _check_alike(config: Config) -> None:
    """Checks that all processes were started with the same settings and packages.

    Raises:
      UserError: in all processes; names what differs.
    """
    settings = {
        f"config.{key}": value
        for key, value in configs.values_of(config).items()
        if configs.resumable_in(key) != "content" and key not in _OF_A_HOST
    }
    advice = "start all processes with the same command and the same packages"
    processes.check_same("settings", {**processes.versions(), **settings}, advice=advice)


def _trained(config: Config, held: Held, hooks: Hooks, *, allow_pickle: bool, stop: Stop) -> dict[str, float]:
    workdir = held.workdir
    parts = assemble(config, workdir, hooks, allow_pickle=allow_pickle)
    try:
        with Closing() as closing:
            return _train(config, held, parts, hooks, closing, stop)
    except NotFiniteError as error:
        if processes.is_first():
            resume.mark_not_finite(workdir, error)
        raise
    except Exception:
        time.sleep(_DELETING)
        if processes.is_first() and not (workdir / "config.json").exists():
            checkpoint.remove_torn(workdir, is_gone=bool(held.own) and not held.is_own())
        held.check()  # whatever failed, it failed because the folder is gone
        raise


class _Session(NamedTuple):
    """The open files and the evaluation of a run that trains."""

    manager: CheckpointManager
    write: Write
    report: Report
    log: Log
    profiler: Profiler
    teacher_params: PyTree  # of all teachers, on the devices
    evaluate: Callable[[int, PyTree], dict[str, float]]  # (step, student_params) -> figures
    samples: Callable[[PyTree], Table]  # the student's parameters, on the host -> answers to evaluate.prompts


def _open(
    config: Config, held: Held, parts: Parts, hooks: Hooks, closing: Closing
) -> tuple[_Session, TrainState, dict[str, float]]:
    """(session, state, figures of its last evaluation), at the last checkpoint or at the start; creates the folder."""
    workdir, training, steps, per_epoch = held.workdir, parts.training, parts.steps, parts.per_epoch
    state = training.init(parts.pair.student_params)
    teacher_params = jax.device_put(parts.pair.params_of_teachers, training.teacher_shardings)
    is_new = not checkpoint.steps_in(workdir)  # a run that was killed before its first checkpoint begins anew
    processes.wait("read")  # all have read the folder as it was
    if is_new and processes.is_first():
        folders.create(
            workdir,
            config=configs.to_json(config),
            origin=origin_of(
                config, layers=parts.pair.layers, sizes=kept_sizes(config, parts.pair), own=hooks.losses
            ).model_dump_json(indent=2),
            student=parts.pair.student,
            tokenizer=parts.pair.tokenizer,
            probe=_probe(parts.held_out[0]),
        )
        resume.forget_not_finite(workdir)
    processes.wait("created")
    manager = checkpoint.open_manager(
        workdir,
        keep=config.checkpoint.keep,
        best=config.checkpoint.best,
        keep_steps=range(per_epoch, steps + 1, per_epoch) if config.checkpoint.keep_epochs else (),
    )
    closing.callback(lambda: checkpoint.close(manager))
    held.needed = ("config.json", checkpoint.FOLDER)
    state, figures = _restored(manager, config, workdir, state, parts)
    into_folder, show, report = open_writers(config, workdir, start=int(state.step), total=steps, closing=closing)

    def write(step: int, kind: str, figures: Mapping[str, float]) -> None:
        held.check()  # with every record, and so before every save
        into_folder(step, kind, figures)
        hooks.on_record(step, kind, figures)

    report(describe(config, parts.pair, parts.text, parts.meshes, steps=steps, per_epoch=per_epoch))
    rates = rates_of(config, parts.pair)
    log = Log(write, training.schedule, last_good=lambda step: _last_good(manager, step), rates=rates)
    profiler = Profiler(config.log.profile, workdir, report)
    closing.callback(profiler.close)

    samples = make_samples(config.evaluate, parts.pair)

    def evaluate(at: int, student_params: PyTree) -> dict[str, float]:
        measured = dict(parts.evaluate(student_params, parts.pair.of_first(teacher_params)))
        check_finite(measured, of=lambda: f"step {at}; {_last_good(manager, at)}")
        if config.log.shows_texts:
            show(at, "figures", beside_teacher(measured))
            if config.evaluate.prompts:
                show(at, "samples", samples(on_host(student_params)))
        return measured

    return _Session(manager, write, report, log, profiler, teacher_params, evaluate, samples), state, figures


def _train(config: Config, held: Held, parts: Parts, hooks: Hooks, closing: Closing, stop: Stop) -> dict[str, float]:
    """Trains from the last checkpoint to the last step; returns the figures of the last evaluation."""
    session, state, figures = _open(config, held, parts, hooks, closing)
    log, report, steps = session.log, session.report, parts.steps
    # Training has its own copy of the student's parameters; of those on the host, the shapes are enough.
    shapes = jax.eval_shape(lambda params: params, parts.pair.student_params)
    parts = parts._replace(pair=parts.pair._replace(student_params=shapes))
    key, start = jax.random.key(config.seed), int(state.step)
    if start == 0:
        with taking("measuring the student before its first step"):
            session.write(0, "eval", session.evaluate(0, state.params["student"]))
    memory.give_back()
    due = Due(config, stop, steps=steps, per_epoch=parts.per_epoch)
    at, stops, began_at = start, False, time.perf_counter()
    for at in range(start + 1, steps + 1):
        batch = _put(log.next(parts.batches), at, parts, state, session.teacher_params)
        with session.profiler.step(at):
            state, metrics = parts.training.step(state, session.teacher_params, batch, key)
        session.profiler.after(at, metrics)
        if at == start + 1:
            jax.block_until_ready(metrics)
            report(f"first step after {time.perf_counter() - began_at:.1f} s, most of it compilation")
            memory.give_back()
            log.restart()
            stop.defers = True  # from now on there is a step to save
        log.read()  # the figures of an earlier step, while this one runs
        actions = due.after(at)
        if actions.log:
            log.put(at, metrics)
        if actions.evaluate or actions.save:
            log.read()  # now, so that no NaN is ever evaluated or saved
        if actions.evaluate:
            figures = session.evaluate(at, state.params["student"])
            session.write(at, "eval", figures)
        if actions.save:
            held.publish()  # first, so that the records of all steps of a checkpoint are there
            notes, measured = _notes(config, parts, figures), figures if actions.evaluate else None
            checkpoint.save(session.manager, at, _items(state), notes=notes, metrics=measured)
            if hooks.on_checkpoint is not None:
                checkpoint.finish(session.manager)
                hooks.on_checkpoint(at)
            due.restart()
        if actions.evaluate or actions.save:
            log.restart()
        if stops := actions.stop:
            break
    checkpoint.finish(session.manager)
    held.check()
    stop.defers = False
    if stops or (stop.asked and processes.count() == 1):  # of several processes, those that did not agree go on
        by = stop.asked or "a signal to another process"
        raise Interrupted(
            f"stopped by {by} after step {at} of {steps}; its checkpoint is saved in {held.workdir}, and the same "
            "command goes on from there"
        )
    if not figures:  # resumed after the last step
        figures = session.evaluate(steps, state.params["student"])
    if config.evaluate.prompts:
        for line in lines_of(session.samples(on_host(state.params["student"]))):
            report(line)
    return figures


def _put(batch: HostBatch, at: int, parts: Parts, state: TrainState, teacher_params: PyTree) -> Batch:
    """The batch of step `at` on the devices: rows of the text, and rows that models write beside or instead of them."""
    if parts.rollouts is None:
        return sharding.put_batch(batch, parts.meshes.student)
    return parts.rollouts(at - 1, batch, state.params["student"], parts.pair.of_first(teacher_params))


def _restored(
    manager: CheckpointManager, config: Config, workdir: Path, state: TrainState, parts: Parts
) -> tuple[TrainState, dict[str, float]]:
    """(state, figures of its last evaluation) of the last whole checkpoint, or as given; moves parts.batches there.

    Raises:
      UserError: the checkpoint is of other text; no checkpoint can be read.
    """
    recorded = parts.recorded
    resume.check_content(config, workdir, recorded, parts.text, parts.content)
    found = checkpoint.restore(manager, _items(state), report=say)
    if found is None:
        return state, {}
    at, items, notes = found
    assert recorded is not None, "read_config refuses a folder with checkpoints and without a config"
    old = resume.steps_of(configs.recorded_values(recorded), per_epoch=parts.per_epoch)
    resume.check_length(config, workdir, old=old, new=parts.steps, at=at)
    if processes.is_first():
        resume.go_on_with(config, workdir, recorded, old=old, new=parts.steps, report=say)
    parts.batches.set_state(notes["data"])
    say(f"resumed {workdir} at step {at} of {parts.steps}")
    return _from_items(items), notes["figures"]


def _notes(config: Config, parts: Parts, figures: dict[str, float]) -> dict[str, Any]:
    """What stands in a checkpoint beside its arrays."""
    return {
        "data": parts.batches.get_state(),
        "text": parts.text.path.name,
        "content": parts.content,
        "steps": parts.steps,
        "figures": figures,
        "config": json.loads(configs.to_json(config)),
    }


def _items(state: TrainState) -> dict[str, PyTree]:
    """How a state is stored: the student by itself, so that evaluate and export read nothing else."""
    rest = {"step": state.step, "projections": state.params["projections"], "opt_state": state.opt_state}
    return {"student": state.params["student"], "rest": rest}


def _from_items(items: dict[str, PyTree]) -> TrainState:
    rest = items["rest"]
    params = {"student": items["student"], "projections": rest["projections"]}
    return TrainState(rest["step"], params, rest["opt_state"])


def _last_good(manager: CheckpointManager, failed: int) -> str:
    """For the message where the parameters after step `failed` give a figure that is not finite.

    A checkpoint of that step has these parameters, so that no other settings help a run that goes on from it.
    """
    with suppress(UserError):  # a disk that is full as well must not bury that
        checkpoint.finish(manager)
    good = [step for step in manager.all_steps() if step < failed]
    last = f"the last good checkpoint is that of step {max(good)}" if good else "there is no good checkpoint"
    is_saved = manager.latest_step() == failed
    return f"remove {manager.directory / str(failed)}, whose parameters gave this; {last}" if is_saved else last


def _probe(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A few real rows, masked as in training."""
    return {name: np.asarray(batch[name][:PROBE_ROWS]) for name in ("input_ids", "attention_mask")}
