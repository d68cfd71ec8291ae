"""The commands beside train: what each does once its flags are read."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import build, loop, sharding
from jaxdistill import config as configs
from jaxdistill import workdir as folders
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.export import export, model_card
from jaxdistill.models import load, student


def prepare(path: str, overrides: Sequence[str]) -> Path:
    """Tokenises a recipe's text, held-out text too, and returns the folder for `data.prepared`."""
    config = configs.parse(path, overrides)
    source = build.open_text(config)
    name = config.tokenizer.name or config.teacher.name or config.student.name
    revision = config.tokenizer.revision if config.tokenizer.name else config.teacher.revision
    tokenizer = load.load_tokenizer(load.resolve(name, revision=revision))
    return build.prepare_text(config, source, tokenizer, tell=print).path


def init_student(
    *,
    teacher: str,
    revision: str,
    layers: str,
    family: str,
    reference_init: bool,
    seed: int,
    allow_pickle: bool,
    out: Path,
) -> None:
    """Cuts a student out of a teacher and writes it as a PyTorch folder."""
    folder = load.resolve(teacher, revision=revision, allow_pickle=allow_pickle)
    model = load.build(load.load_config(folder))
    chosen = student.resolve_layers(layers, of=model.num_layers)
    config = student.student_config(model.config, family=family or model.config.model_type, layers=chosen)
    made = load.build(config)
    params = student.cut_student(
        load.load_params(folder, model, allow_pickle=allow_pickle),
        teacher=model,
        student=made,
        layers=chosen,
        reference_init=reference_init,
        key=jax.random.key(seed),
    )
    tokenizer = load.load_tokenizer(folder)
    load.check_tokenizer(tokenizer, config)
    recipe = {
        "teacher": {"name": teacher},
        "student": {"layers": list(chosen), "reference_init": reference_init},
    }
    card = model_card(name=out.name, base_model=teacher, recipe=recipe, license="", results={})
    probe = tokenizer(["The quick brown fox jumps over the lazy dog."], return_tensors="np")
    probe = {"input_ids": probe["input_ids"], "attention_mask": probe["attention_mask"].astype(bool)}
    export(model=made, params=params, tokenizer=tokenizer, out=out, to="pytorch", card=card, probe=probe)
    print(
        f"layers {','.join(map(str, chosen))} of {teacher} are in {out}: {config.model_type}, "
        f"{load.count_params(params):,} of {load.count_params(load.param_shapes(model)):,} parameters"
    )


def evaluate(
    workdir: Path, *, step: int | None, metrics: Sequence[str] | None, overrides: Sequence[str], allow_pickle: bool
) -> dict[str, float]:
    """Measures a checkpoint on the run's held-out text, or on what `--config.data...` names instead.

    Args:
      metrics: None = those of the run.
    """
    for name in metrics or ():
        if name not in EVALUATORS:
            raise UserError(f"--metrics holds {name!r}; there are {', '.join(EVALUATORS)}")
    recorded = folders.read_config(workdir)
    if recorded is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    config = configs.apply(recorded, overrides)
    config.evaluate.metrics = tuple(metrics or config.evaluate.metrics)
    if not config.teacher.name and "agreement" in (metrics or ()):
        raise UserError("--metrics holds agreement, and this run has no teacher to agree with")
    found = folders.load_student(workdir, step=step, tell=print)
    source = build.open_text(config)
    teacher, teacher_params = build.build_teacher(config, allow_pickle=allow_pickle)
    # In the dtypes of the run, so that its own figures come out again.
    teacher_params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(config.teacher.dtype)), teacher_params)
    made = load.build(found.model.config, dtype=jnp.dtype(config.student.dtype))
    models = build.Models(made, found.params, teacher, teacher_params, found.tokenizer, None)
    text = build.prepare_text(config, source, found.tokenizer, tell=print)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    loop.check_evaluation_rows(config, mesh)
    measure = loop.make_evaluator(config, models, text.vocabulary, build.make_held_out(config, text), mesh=mesh)
    everywhere = sharding.replicated(mesh)
    return dict(measure(jax.device_put(found.params, everywhere), jax.device_put(teacher_params, everywhere)))
