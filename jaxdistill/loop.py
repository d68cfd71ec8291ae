"""A run from start to end: build, restore, then train, log, evaluate and checkpoint; export; close."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxdistill import build, checkpoint, memory, optim, sharding, writers
from jaxdistill import config as configs
from jaxdistill import workdir as folders
from jaxdistill.build import Models, Tell
from jaxdistill.config import Config
from jaxdistill.data.pipeline import steps_per_epoch
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS, Context
from jaxdistill.evaluate.fill_mask import encode_prompts, fill_mask
from jaxdistill.generate import make_generator
from jaxdistill.objective import init_projections, on_samples
from jaxdistill.step import TrainState, make_train_step


def run(config: Config, workdir: Path, *, allow_pickle: bool = False) -> dict[str, float]:
    """Trains, or goes on where `workdir` stands, and returns the last evaluation's figures.

    Raises:
      UserError: whatever the user can mend; what was written before stays whole.
    """
    configs.validate(config)
    began = folders.read_config(workdir)
    if began is not None and (differences := configs.changed(began, config)):
        key, old, new = differences[0]
        raise UserError(
            f"--workdir {workdir} holds a run with config.{key}={old!r}, and now it is {new!r}; "
            "name another --workdir, or repeat the config to resume"
        )
    mesh, teacher_mesh = sharding.make_meshes(
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        student=config.student.devices,
        teacher=config.teacher.devices,
    )
    apart = teacher_mesh is not mesh
    check_rows(config, mesh, teacher_mesh)
    check_kernel(config, mesh.devices.flat[0])
    writers.check_installed(tensorboard=config.log.tensorboard, wandb=bool(config.log.wandb))
    source = build.open_text(config)
    models = build.build_models(config, allow_pickle=allow_pickle, tell=print)
    check_prompts(config, models)
    objective = build.build_objective(config, models)
    build.pruned(config, models.student)  # or refuses it
    optim.check_patterns(models.student_params, config.train.freeze, key="config.train.freeze")

    with ExitStack() as closing:
        text = build.prepare_text(config, source, models.tokenizer, causal=models.student.family.causal, tell=print)
        held_out = build.make_held_out(config, text)
        evaluate = make_evaluator(config, models, text, held_out, mesh=mesh)  # or refuses what it is to measure
        per_epoch = steps_per_epoch(
            text.train, batch_size=config.train.batch_size, limit_batches=config.train.limit_batches
        )
        steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)

        training = make_training(config, models, objective, mesh=mesh, teacher_mesh=teacher_mesh, steps=steps)
        state = training.init(models.student_params)
        # Trained on the devices from here on; the host keeps its shapes alone.
        models = models._replace(student_params=jax.eval_shape(lambda params: params, models.student_params))
        teacher_params = jax.device_put(models.teacher_params, training.teacher_shardings)
        batches = iter(build.make_batches(config, text, steps=steps))

        if began is None:
            folders.create(
                workdir,
                config=configs.to_json(config),
                student=models.student,
                tokenizer=models.tokenizer,
                probe=build.probe_of(held_out),
            )
        manager = checkpoint.open_manager(
            workdir,
            keep=config.checkpoint.keep,
            best=config.checkpoint.best,
            keep_steps=range(per_epoch, steps + 1, per_epoch) if config.checkpoint.keep_epochs else (),
        )
        closing.callback(manager.close)
        figures: dict[str, float] = {}
        if (found := checkpoint.restore(manager, _items(state), tell=print)) is not None:
            at, items, notes = found
            if notes["text"] != text.path.name:
                raise UserError(
                    f"the text or the tokenizer is not the one that {workdir} was begun with (prepared as {text.path}, "
                    f"then as {notes['text']}); put it back, or name another --workdir"
                )
            state = _from_items(items)
            batches.set_state(notes["data"])
            figures = notes["figures"]
            print(f"resumed {workdir} at step {at} of {steps}")
        start = int(state.step)

        write, tell = _open_writers(config, workdir, start=start, total=steps, closing=closing)
        shape = {"student": dict(mesh.shape), "teacher": dict(teacher_mesh.shape)} if apart else dict(mesh.shape)
        tell(build.describe(config, models, text, mesh=shape, steps=steps, per_epoch=per_epoch))
        rollouts = build.build_rollouts(config, models, mesh=mesh)
        if apart:
            evaluate = _with_teacher_here(evaluate, config, sharding.by_rule(models.teacher_params, mesh))
        schedule = _schedule(config, steps)

        def save(at: int, state: TrainState, measured: dict[str, float] | None) -> None:
            notes = {
                "data": batches.get_state(),
                "text": text.path.name,
                "figures": figures,
                "config": json.loads(configs.to_json(config)),
            }
            checkpoint.save(manager, at, _items(state), notes=notes, metrics=measured)

        eval_every = config.evaluate.every or per_epoch
        save_every = config.checkpoint.every or per_epoch
        log = _Log(write, schedule, where=lambda: _last_good(manager))
        key = jax.random.key(config.seed)
        if start == 0:
            write(0, "eval", dict(evaluate(state.params["student"], teacher_params)))  # what training starts from
        memory.give_back()
        began_at = time.perf_counter()
        for at in range(start + 1, steps + 1):
            batch = log.next(batches)
            if rollouts is None:
                batch = sharding.put_batch(batch, mesh)
            else:
                batch = rollouts(at - 1, batch, state.params["student"], teacher_params)
            state, metrics = training.step(state, teacher_params, batch, key)
            if at == start + 1:
                jax.block_until_ready(metrics)
                tell(f"first step after {time.perf_counter() - began_at:.1f} s, most of it compilation")
                memory.give_back()
                log.restart()
            log.read()  # the figures of an earlier step, while this one runs
            due_eval = at % eval_every == 0 or at == steps
            due_save = at % save_every == 0 or at == steps
            if at % config.log.every == 0 or due_eval or due_save:
                log.put(at, metrics)
            if due_eval or due_save:
                log.read()  # now, so that no NaN is ever evaluated or saved
            if due_eval:
                figures = dict(evaluate(state.params["student"], teacher_params))
                write(at, "eval", figures)
            if due_save:
                save(at, state, figures if due_eval else None)
            if due_eval or due_save:
                log.restart()
        checkpoint.finish(manager)
        if not figures:  # resumed after the last step
            figures = dict(evaluate(state.params["student"], teacher_params))
        student_params = jax.device_get(state.params["student"])
        show_prompts(config, models, student_params, tell=tell)
    for to in config.export.to:
        out = workdir / f"export-{to}"
        if not out.exists():  # a folder there is whole, as an earlier start of this run proved it
            export_run(workdir, out, to=to, tell=print)
    return figures


def export_run(
    workdir: Path, out: Path, *, to: Literal["pytorch", "flax"], tell: Tell, step: int | None = None
) -> None:
    """Writes a run's student as a Hugging Face folder and proves that it reads back the same."""
    from jaxdistill.export import export, model_card

    student = folders.load_student(workdir, step=step, tell=tell)
    teacher = student.config["teacher"]["name"]
    licence = student.config["export"]["license"]
    card = model_card(
        name=out.name,
        base_model=teacher,
        recipe=student.config,
        license=licence,
        results=student.figures,
        causal=student.model.family.causal,
    )
    export(
        model=student.model,
        params=student.params,
        tokenizer=student.tokenizer,
        out=out,
        to=to,
        card=card,
        probe=student.probe,
    )
    tell(f"exported step {student.step} of {workdir} to {out} ({to}); its logits are the checkpoint's")


def check_rows(config: Config, mesh: jax.sharding.Mesh, teacher_mesh: jax.sharding.Mesh | None = None) -> None:
    """Raises UserError where the rows of a batch do not divide over the devices, or over the teacher's own."""
    pieces = config.train.accumulation * config.mask.group
    for one, whose in ((mesh, "devices"), (teacher_mesh or mesh, "devices of the teacher")):
        if config.train.batch_size % (pieces * one.size):
            raise UserError(
                f"config.train.batch_size={config.train.batch_size} must be a multiple of train.accumulation x "
                f"mask.group={pieces} x {one.size} {whose} = {pieces * one.size}; change one of them"
            )
    check_evaluation_rows(config, mesh)


def check_kernel(config: Config, device: Any) -> None:
    """Raises UserError where attention is asked of a kernel that such a device does not have."""
    for side in ("teacher", "student"):
        if config[side].attention == "cudnn" and device.platform != "gpu":
            raise UserError(
                f"config.{side}.attention=cudnn is a kernel of NVIDIA's GPUs, not of {device.device_kind}; set xla"
            )


def check_evaluation_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """As `check_rows`, for the batches of held-out text."""
    if config.evaluate.batch_size % mesh.size:
        raise UserError(
            f"config.evaluate.batch_size={config.evaluate.batch_size} must be a multiple of the {mesh.size} devices"
        )


def _schedule(config: Config, steps: int) -> optax.Schedule:
    c = config.optim
    return optim.make_schedule(learning_rate=c.learning_rate, schedule=c.schedule, warmup=c.warmup, steps=steps)


class Training(NamedTuple):
    """The compiled parts of a run, and where their arguments lie."""

    init: Callable[[PyTree], TrainState]  # of the student's parameters, which it copies
    step: Any  # see make_train_step
    teacher_shardings: Any


def make_training(
    config: Config, models: Models, objective: Any, *, mesh: Any, teacher_mesh: Any = None, steps: int
) -> Training:
    """From models, or from their shapes alone: nothing is computed here. teacher_mesh: its own; None = the same."""
    c = config.optim
    projections = {}
    if models.teacher is not None:
        projections = init_projections(
            objective,
            student_width=models.student.width,
            teacher_width=models.teacher.width,
            num_layers=(models.student.num_layers, models.teacher.num_layers),
            key=jax.random.fold_in(jax.random.key(config.seed), 1),
        )
    shapes = {"student": models.student_params, "projections": projections}
    optimizer = optim.make_optimizer(
        shapes,
        name=c.name,
        learning_rate=_schedule(config, steps),
        betas=tuple(c.betas),
        eps=c.eps,
        weight_decay=c.weight_decay,
        no_decay=c.no_decay,
        clip=c.clip,
        freeze=config.train.freeze,
    )

    def init(student_params: PyTree) -> TrainState:
        # A copy, as the step donates the state and the parameters here are somebody's.
        params = {"student": student_params, "projections": projections}
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    state_shardings = sharding.by_rule(jax.eval_shape(init, models.student_params), mesh)
    teacher_shardings = sharding.by_rule(models.teacher_params, teacher_mesh or mesh)
    step = make_train_step(
        student=models.student,
        teacher=models.teacher,
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        state_shardings=state_shardings,
        teacher_shardings=teacher_shardings,
        teacher_mesh=teacher_mesh,
        accumulation=config.train.accumulation,
        group=config.mask.group,
        capacity=build.capacity(config, group=config.mask.group),
        freeze=config.train.freeze,
        # What is sampled is scored without dropout, and its probability now is compared with that.
        dropout=not on_samples(objective),
        drop_rates=build.drop_rates(config, models.student, steps=steps),
        remat=config.student.remat,
        ramp=build.build_ramp(config, objective, steps=steps),
    )
    return Training(jax.jit(init, out_shardings=state_shardings), step, teacher_shardings)


def _items(state: TrainState) -> dict[str, PyTree]:
    """How a state is filed: the student by itself, so that evaluate and export read nothing else."""
    rest = {"step": state.step, "projections": state.params["projections"], "opt_state": state.opt_state}
    return {"student": state.params["student"], "rest": rest}


def _from_items(items: dict[str, PyTree]) -> TrainState:
    rest = items["rest"]
    params = {"student": items["student"], "projections": rest["projections"]}
    return TrainState(rest["step"], params, rest["opt_state"])


def make_context(
    config: Config,
    models: Models,
    text: build.Text,
    held_out: Any,
    *,
    mesh: Any,
    take: Callable[[list[dict[str, str]]], None] | None = None,
) -> Context:
    """What is measured on: the held-out batches, whose rows are masked one by one."""
    asked = build.completions(config, models, text)
    return Context(
        student=models.student,
        teacher=models.teacher,
        batches=held_out,
        mesh=mesh,
        capacity=build.capacity(config, group=1),
        mask_id=text.vocabulary.mask,
        special_ids=text.vocabulary.special,
        pseudo_rows=config.evaluate.pseudo_rows,
        pruned=build.pruned(config, models.student),
        completions=asked and asked._replace(take=take),
    )


def make_evaluator(
    config: Config,
    models: Models,
    text: build.Text,
    held_out: Any,
    *,
    mesh: Any,
    take: Callable[[list[dict[str, str]]], None] | None = None,
) -> Callable[[PyTree, PyTree], Iterator[tuple[str, float]]]:
    """All of config.evaluate.metrics as one evaluator; each is compiled once. `take` gets rouge's completions."""
    context = make_context(config, models, text, held_out, mesh=mesh, take=take)
    rows = [EVALUATORS[name] for name in config.evaluate.metrics]
    evaluators = [row.make(context) for row in rows if models.teacher or not row.needs_teacher]

    def evaluate(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        for one in evaluators:
            yield from one(student_params, teacher_params)

    return evaluate


def _with_teacher_here(evaluate: Callable, config: Config, shardings: PyTree) -> Callable:
    """An evaluator runs both models in one program: a teacher with devices of its own is copied to the student's.

    For as long as an evaluation takes, and only where one looks at the teacher. So the student's devices must have
    room for it beside the state; one that is too large is measured by `jaxdistill evaluate`, on all devices.
    """
    needed = any(EVALUATORS[name].needs_teacher for name in config.evaluate.metrics)

    def with_teacher_here(student_params: PyTree, teacher_params: PyTree) -> Iterator[tuple[str, float]]:
        copy = jax.device_put(teacher_params, shardings) if needed else None
        yield from evaluate(student_params, copy)

    return with_teacher_here


def check_prompts(config: Config, models: Models) -> None:
    """Raises UserError for a prompt that cannot be shown to the models at the end."""
    prompts = list(config.evaluate.prompts)
    if not models.student.family.causal:
        encode_prompts(models.tokenizer, prompts, max_length=models.student.max_length)
    for prompt in prompts if models.student.family.causal else ():
        size, new = len(models.tokenizer(prompt)["input_ids"]), config.evaluate.max_new_tokens
        for role, model in (("student", models.student), ("teacher", models.teacher)):
            if model is not None and not 1 <= size <= model.max_length - new:
                raise UserError(
                    f"config.evaluate.prompts: {prompt!r} is {size} tokens long; with "
                    f"config.evaluate.max_new_tokens={new}, 1 to {model.max_length - new} fit the {role}"
                )


def show_prompts(config: Config, models: Models, student_params: PyTree, *, tell: Tell) -> None:
    """Prints what teacher and student put for the mask of each prompt, or after it, side by side."""
    prompts = list(config.evaluate.prompts)
    sides = [("student", models.student, student_params)]
    if models.teacher is not None:
        sides.insert(0, ("teacher", models.teacher, models.teacher_params))
    answers = {name: _answers(config, models, model, params, prompts) for name, model, params in sides if prompts}
    for i, prompt in enumerate(prompts):
        tell(prompt)
        for name, _, _ in sides:
            tell(f"  {name}: {answers[name][i]}")


def _answers(config: Config, models: Models, model: Any, params: PyTree, prompts: list[str]) -> list[str]:
    if model.family.causal:
        ids = models.tokenizer(prompts)["input_ids"]
        generate = make_generator(model, decoding=build.greedy(config, models), batch_size=len(prompts))
        tokens = [list(one.tokens) for one in generate(params, ids, jax.random.key(0))]
        return [" ".join(text.split()) for text in models.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    filled = fill_mask(model, params, models.tokenizer, prompts)
    return [", ".join(f"{word} {p:.0%}" for word, p in words) for words in filled]


def _last_good(manager: Any) -> str:
    manager.wait_until_finished()
    step = manager.latest_step()
    return "there is no checkpoint" if step is None else f"the last good checkpoint is that of step {step}"


def _open_writers(
    config: Config, workdir: Path, *, start: int, total: int, closing: ExitStack
) -> tuple[writers.Write, Tell]:
    if jax.process_index() != 0:
        return (lambda step, kind, figures: None), (lambda line: None)
    write, close = writers.jsonl(workdir / "metrics.jsonl", resume_at=start)
    opened = [(write, close)]
    if config.log.tensorboard:
        opened.append(writers.tensorboard(workdir / "tensorboard"))
    if config.log.wandb:
        opened.append(writers.wandb(workdir, project=config.log.wandb, config=config.to_dict()))
    show, stop, tell = writers.progress(total=total, start=start)
    opened.append((show, stop))
    for _, close in opened:
        closing.callback(close)
    return writers.both(*[write for write, _ in opened]), tell


class _Log:
    """Figures of a step and of the window before it: put when the step is dispatched, read one step later."""

    def __init__(self, write: writers.Write, schedule: optax.Schedule, *, where: Callable[[], str]):
        self.write, self.schedule, self.where = write, schedule, where
        self.pending: tuple[int, Any, int, float] | None = None
        self.tokens, self.waited = 0, 0.0  # since the last put
        self.since = time.perf_counter()  # the last read

    def restart(self) -> None:
        """Leaves what came before out of tokens/s: compilation, evaluations, checkpoints."""
        self.tokens, self.waited, self.since = 0, 0.0, time.perf_counter()

    def next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        self.tokens += int(batch["attention_mask"].sum()) * jax.process_count()
        return batch

    def put(self, at: int, metrics: Any) -> None:
        self.pending = (at, metrics, self.tokens, self.waited)
        self.tokens, self.waited = 0, 0.0

    def read(self) -> None:
        """Waits for the pending metrics and writes them.

        Raises:
          UserError: the loss or the gradient is not finite.
        """
        if self.pending is None:
            return
        (at, metrics, tokens, waited), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        norm = values.pop("grad_norm")
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            raise UserError(
                f"loss is {values['loss']} and the gradient's norm {norm} at step {at}; {self.where()}. "
                "Lower config.optim.learning_rate or config.optim.clip"
            )
        figures = {
            "loss": values.pop("loss"),
            **values,
            "grad_norm": norm,
            "learning_rate": float(np.asarray(self.schedule(at - 1))),
        }
        if tokens:  # not where the clock began after the step itself, as for the first
            figures |= {"tokens_per_s": tokens / seconds, "input_wait": waited / seconds}
        self.write(at, "train", figures)
