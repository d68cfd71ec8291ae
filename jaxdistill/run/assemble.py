"""The parts of a run, made from its config: every check that can fail early fails here."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill import config as configs
from jaxdistill import processes
from jaxdistill.config import Config
from jaxdistill.console import say, taking
from jaxdistill.data import text as texts
from jaxdistill.data.batching import HostBatch
from jaxdistill.data.pipeline import BatchIterator, Hosts, Schedule, steps_per_epoch
from jaxdistill.data.text import Text
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS, lower_is_better
from jaxdistill.evaluate.context import Evaluator
from jaxdistill.evaluate.evaluator import make_context, make_evaluator
from jaxdistill.evaluate.perplexity import pruned_layers
from jaxdistill.losses.objective import make_objective
from jaxdistill.losses.term import Objective
from jaxdistill.models.pair import Pair
from jaxdistill.run import importance, resume, writers
from jaxdistill.run.accumulation import with_accumulation
from jaxdistill.run.hooks import Hooks
from jaxdistill.run.models import load_pair
from jaxdistill.run.prompts import check_prompts
from jaxdistill.run.teacher_cache import answers_of, open_for_run
from jaxdistill.run.training import Training, check_devices, check_patterns, make_training
from jaxdistill.sampling.on_policy import BatchLayout, Rollouts, make_rollouts
from jaxdistill.step import sharding
from jaxdistill.step.sharding import Meshes


class Parts(NamedTuple):
    """All that a run is made of."""

    recorded: dict[str, Any] | None  # the config of the run that the workdir holds; None where it holds none yet
    meshes: Meshes
    pair: Pair
    text: Text
    held_out: Sequence[HostBatch]
    batches: BatchIterator  # of training
    evaluate: Evaluator
    rollouts: Rollouts | None  # makes the batches that models write
    training: Training
    steps: int
    per_epoch: int  # steps
    content: dict[str, str]  # digests of what the run depends on, from resume.content


def assemble(
    config: Config,
    workdir: Path,
    hooks: Hooks = Hooks(),  # noqa: B008 - immutable
    *,
    allow_pickle: bool,
) -> Parts:
    """Loads models and text and makes the functions of a run; trains nothing, and writes prepared text at most.

    Raises:
      UserError: settings, files or devices that do not fit.
    """
    configs.check(config, own_losses=bool(hooks.losses))
    recorded = resume.began_with(config, workdir)
    meshes = sharding.make_meshes(config.mesh, student=config.student.devices, teacher=config.teacher.devices)
    check_devices(config, meshes)
    writers.check_installed(config.log)
    source = texts.open_text(config.data)
    with taking("reading the models"):
        pair = load_pair(config, allow_pickle=allow_pickle, report=say, meshes=meshes)
    if recorded is None:  # a run that began before this rule goes on
        _check_best(config, pair)
    check_prompts(config.evaluate, pair)
    objective = make_objective(config.loss, config.policy, pair, hooks.losses)
    pruned_layers(config.evaluate, pair.student)  # raises for layers that do not exist
    check_patterns(config, pair, objective)

    text = texts.prepare_text(config.data, source, pair.tokenizer, causal=pair.student.family.causal, report=say)
    held_out = held_out_of(config, text)
    pair = importance.with_student(config, pair, text, meshes, allow_pickle=allow_pickle)
    context = make_context(config.evaluate, config.mask, pair, text, held_out, mesh=meshes.student)
    evaluate = make_evaluator(config.evaluate, context)
    if meshes.separate:
        evaluate = _with_teacher_copied(evaluate, config, sharding.of_teacher(pair, meshes.student))
    per_epoch = steps_per_epoch(
        text.train, batch_size=config.train.batch_size, limit_batches=config.train.limit_batches
    )
    _check_ends_of_epochs(config, per_epoch)
    steps = resume.steps_of(configs.values_of(config), per_epoch=per_epoch)
    answers = None
    if pair.cached is not None:
        answers = answers_of(config, pair, objective, open_for_run(config, pair, objective, text))
    batches = train_batches_of(config, text, steps=steps, answers=answers)
    config = with_accumulation(
        config,
        pair,
        objective,
        meshes,
        lambda: next(train_batches_of(config, text, steps=steps, answers=answers)),
        steps=steps,
        report=say,
    )
    rollouts = rollouts_of(config, pair, objective, mesh=meshes.student)
    training = make_training(config, pair, objective, meshes, steps=steps)
    content = resume.content(config, pair, text) | ({resume.OWN_LOSSES: said} if (said := hooks.said_of_losses) else {})
    processes.check_same(
        "content",
        {f"the digest of the {name}": digest for name, digest in content.items()},
        advice="give all hosts the same files",
    )
    return Parts(
        recorded, meshes, pair, text, held_out, batches, evaluate, rollouts, training, steps, per_epoch, content
    )


def held_out_of(config: Config, text: Text) -> Sequence[HostBatch]:
    """The held-out batches that the evaluation settings ask for."""
    return texts.held_out_batches(
        text,
        config.data,
        config.mask,
        batch_size=config.evaluate.batch_size,
        limit=config.evaluate.batches,
        hosts=_hosts(),
    )


def train_batches_of(
    config: Config, text: Text, *, steps: int, answers: Callable[[HostBatch], HostBatch] | None = None
) -> BatchIterator:
    """The training batches, as data.text.train_batches."""
    schedule = Schedule(config.train.batch_size, steps, config.train.limit_batches, config.seed)
    return texts.train_batches(text, config.data, config.mask, schedule, hosts=_hosts(), answers=answers)


def rollouts_of(config: Config, pair: Pair, objective: Objective, *, mesh: Mesh) -> Rollouts | None:
    """Makes the batches that models write; None where they write none.

    Raises:
      UserError: prompt and completion do not fit a model's positions.
    """
    if not config.samples:
        return None
    layout = BatchLayout(config.data.max_length, config.train.accumulation, config.mask.group, mesh)
    return make_rollouts(config.sample, objective.policy, pair, layout, seed=config.seed)


def _hosts() -> Hosts:
    return Hosts(jax.process_index(), jax.process_count())


def _check_best(config: Config, pair: Pair) -> None:
    best, metrics = config.checkpoint.best, config.evaluate.metrics
    measured = lower_is_better(metrics, teacher=pair.teacher is not None, causal=pair.student.family.causal)
    if best and best not in measured:
        without = "" if pair.teacher else " without a teacher"
        raise UserError(
            f"config.checkpoint.best={best!r} is not measured on a {pair.student.config.model_type}{without} by "
            f"config.evaluate.metrics={metrics!r}; set it to one of {', '.join([*measured, repr('')])}, or add a metric"
        )


def _check_ends_of_epochs(config: Config, per_epoch: int) -> None:
    every = config.checkpoint.every
    if config.checkpoint.keep_epochs and every and per_epoch % every:
        raise UserError(
            f"config.checkpoint.keep_epochs keeps the checkpoint after every epoch of {per_epoch} steps, and "
            f"config.checkpoint.every={every} saves none at step {per_epoch}; set every to 0, or to a divisor of "
            f"{per_epoch}"
        )


def _with_teacher_copied(evaluate: Evaluator, config: Config, shardings: PyTree) -> Evaluator:
    """An evaluator runs both models in one program, so a teacher with devices of its own is copied to the student's.

    The copy lives as long as an evaluation, and is made only where a figure needs the teacher. The student's devices
    must have room for it beside the state; a larger teacher is measured by `jaxdistill evaluate`, on all devices.
    """
    needed = any(EVALUATORS[name].needs_teacher for name in config.evaluate.metrics)
    is_first = True  # when the teacher's own figures are measured

    def with_teacher_copied(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        nonlocal is_first
        copy = jax.device_put(teacher_params, shardings) if needed or is_first else None
        yield from evaluate(student_params, copy)
        is_first = False

    return with_teacher_copied
