"""The commands beside train: what each does once its flags are read."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from jaxdistill import build, loop, search, sharding
from jaxdistill import config as configs
from jaxdistill import workdir as folders
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS
from jaxdistill.export import export, model_card
from jaxdistill.files import write_text, writing
from jaxdistill.generate import Decoding, check, make_generator
from jaxdistill.models import load, student

SEARCH_BATCHES = 8  # of 32 rows: about 5,000 masked tokens at 128 tokens a row
SHOWN = 10  # candidates in the table, besides those that have a name


def prepare(path: str, overrides: Sequence[str]) -> Path:
    """Tokenises a recipe's text, held-out text too, and returns the folder for `data.prepared`."""
    config = configs.parse(path, overrides)
    source = build.open_text(config)
    name = config.tokenizer.name or config.teacher.name or config.student.name
    revision = next(one.revision for one in (config.tokenizer, config.teacher, config.student) if one.name)
    tokenizer = load.load_tokenizer(load.resolve(name, revision=revision))
    causal = build.build_shapes(config).student.family.causal
    return build.prepare_text(config, source, tokenizer, causal=causal, tell=print).path


def init_student(
    *,
    teacher: str,
    revision: str,
    layers: str,
    text: str,
    family: str,
    reference_init: bool,
    seed: int,
    allow_pickle: bool,
    out: Path,
) -> None:
    """Cuts a student out of a teacher and writes it as a PyTorch folder.

    Args:
      layers: as `student.resolve_layers`, or search | search:N: the N (half of them) that stay closest to the teacher.
      text: that the search scores candidates on.

    Raises:
      UserError: whatever does not fit.
    """
    folder = load.resolve(teacher, revision=revision, allow_pickle=allow_pickle)
    model = load.build(load.load_config(folder))
    searched = layers.partition(":")[0] == "search"
    if searched != bool(text):
        raise UserError(
            "--layers search and --text FILE, to score the candidates on, go together; give both or neither"
        )
    tokenizer = load.load_tokenizer(folder)
    load.check_tokenizer(tokenizer, model.config)
    teacher_params = load.load_params(folder, model, allow_pickle=allow_pickle)
    if searched:
        # "search" and "search:N" count as a plain count does.
        count = layers.partition(":")[2] or str(max(model.num_layers // 2, 1))
        count = len(student.resolve_layers(f"spread:{count}", of=model.num_layers))
        chosen = _search(model, teacher_params, tokenizer, text=text, count=count)
    else:
        chosen = student.resolve_layers(layers, of=model.num_layers)
    config = student.student_config(model.config, family=family or model.config.model_type, layers=chosen)
    made = load.build(config)
    params = student.cut_student(
        teacher_params,
        teacher=model,
        student=made,
        layers=chosen,
        reference_init=reference_init,
        key=jax.random.key(seed),
    )
    recipe = {
        "teacher": {"name": teacher},
        "student": {"layers": list(chosen), "reference_init": reference_init},
    }
    card = model_card(
        name=out.name, base_model=teacher, recipe=recipe, license="", results={}, causal=made.family.causal
    )
    probe = tokenizer(["The quick brown fox jumps over the lazy dog."], return_tensors="np")
    probe = {"input_ids": probe["input_ids"], "attention_mask": probe["attention_mask"].astype(bool)}
    export(model=made, params=params, tokenizer=tokenizer, out=out, to="pytorch", card=card, probe=probe)
    print(
        f"layers {','.join(map(str, chosen))} of {teacher} are in {out}: {config.model_type}, "
        f"{load.count_params(params):,} of {load.count_params(load.param_shapes(model)):,} parameters"
    )


def _search(model: load.Model, params: PyTree, tokenizer: Any, *, text: str, count: int) -> tuple[int, ...]:
    """The best `count` layers on the first rows of a text; prints the table they were chosen from."""
    config = configs.base()
    config.data.path = config.data.eval_path = text
    config.data.max_length = min(config.data.max_length, model.max_length)
    config.mask.smoothing = 0.0
    config.evaluate.batches = SEARCH_BATCHES
    held_out = build.prepare_text(config, build.open_text(config), tokenizer, causal=model.family.causal, tell=print)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    loop.check_evaluation_rows(config, mesh)
    models = build.Models(model, params, None, {}, tokenizer, None)
    context = loop.make_context(config, models, held_out, build.make_held_out(config, held_out), mesh=mesh)
    whole, scores = search.search_layers(context, jax.device_put(params, sharding.replicated(mesh)), count=count)
    names = search.named(count, of=model.num_layers)
    print(f"{'kl':>8} {'loss':>8}  layers ({len(scores)} candidates on {text})")
    print(f"{0:8.4f} {whole.loss:8.4f}  all {model.num_layers}")
    for place, one in enumerate(scores):
        if place < SHOWN or one.layers in names:
            print(f"{one.kl:8.4f} {one.loss:8.4f}  {','.join(map(str, one.layers))} {names.get(one.layers, '')}")
    return scores[0].layers


def evaluate(
    workdir: Path,
    *,
    step: int | None,
    metrics: Sequence[str] | None,
    overrides: Sequence[str],
    allow_pickle: bool,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measures a checkpoint on the run's held-out text, or on what `--config.data...` names instead.

    Args:
      metrics: None = those of the run.
      predictions: file for what rouge's completions were: JSON, [{"prompt", "completion", "reference"}, ...].
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
    if predictions is not None and "rouge" not in config.evaluate.metrics:
        raise UserError("--predictions keeps what rouge's completions were; add rouge to --metrics")
    found = folders.load_student(workdir, step=step, tell=print)
    build.check_model(config, found.model, "student")
    source = build.open_text(config)
    teacher, teacher_params = build.build_teacher(config, allow_pickle=allow_pickle)
    # In the dtypes of the run, so that its own figures come out again.
    teacher_params = build.stored(teacher_params, config.teacher.dtype)
    made = build.build_model(found.model.config, config.student)
    models = build.Models(made, found.params, teacher, teacher_params, found.tokenizer, None)
    text = build.prepare_text(config, source, found.tokenizer, causal=made.family.causal, tell=print)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    loop.check_evaluation_rows(config, mesh)
    loop.check_kernel(config, mesh.devices.flat[0])

    def take(records: list[dict[str, str]]) -> None:
        if predictions is not None:
            with writing(predictions):
                write_text(predictions, json.dumps(records, indent=2, ensure_ascii=False) + "\n")

    measure = loop.make_evaluator(config, models, text, build.make_held_out(config, text), mesh=mesh, take=take)
    everywhere = sharding.replicated(mesh)
    return dict(measure(jax.device_put(found.params, everywhere), jax.device_put(teacher_params, everywhere)))


def generate(
    *,
    model: str,
    revision: str,
    allow_pickle: bool,
    input: Path | None,
    out: Path | None,
    decoding: Decoding,
    batch_size: int,
    seed: int,
) -> None:
    """Continues each prompt of a file, or of standard input; prints the texts, or writes them as JSON lines."""
    check(decoding)
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    prompts = read_prompts(input)
    folder = load.resolve(model, revision=revision, allow_pickle=allow_pickle)
    config = load.load_config(folder)
    tokenizer = load.load_tokenizer(folder)
    load.check_tokenizer(tokenizer, config)
    decoding = dataclasses.replace(decoding, end_ids=load.end_ids(folder, config, tokenizer))
    made = load.build(config)
    run = make_generator(made, decoding=decoding, batch_size=batch_size)
    params = jax.device_put(load.load_params(folder, made, allow_pickle=allow_pickle))
    ids = tokenizer(prompts)["input_ids"]
    records = []
    for prompt, before, (tokens, stop) in zip(prompts, ids, run(params, ids, jax.random.key(seed)), strict=True):
        # The end of the whole text: the new tokens alone would lose the space before their first word.
        whole, start = tokenizer.batch_decode([[*before, *tokens], before], skip_special_tokens=True)
        records.append({"prompt": prompt, "completion": whole[len(start) :], "tokens": len(tokens), "stop": stop})
    if out is None:
        for record in records:
            print(record["prompt"] + record["completion"], flush=True)
        return
    with writing(out):
        write_text(out, "".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(records)} completions, {sum(record['tokens'] for record in records):,} tokens, are in {out}")


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a text file or of standard input (None), or the field "prompt" of those of a .jsonl file."""
    name = "standard input" if path is None else str(path)
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        lines = data.decode().split("\n")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error})") from error
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if not lines:
        raise UserError(f"{name} holds no prompt: give one a line")
    if path is None or path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{name}, line {number} is no JSON object with a "prompt"') from error
        if not isinstance(prompts[-1], str):
            raise UserError(f"{name}, line {number}: the prompt is {prompts[-1]!r}, not a text")
    return prompts
