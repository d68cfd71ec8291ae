"""What a report says of runs: their curves, and teacher and students measured side by side on one held-out text."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxdistill import __version__, recipe
from jaxdistill import config as configs
from jaxdistill.config import Config
from jaxdistill.console import taking
from jaxdistill.data import text as texts
from jaxdistill.data.causal import pairs_of
from jaxdistill.data.prompts import prompt_ids
from jaxdistill.data.text import Text
from jaxdistill.errors import UserError
from jaxdistill.evaluate.comparison import layer_similarity, make_comparison, measure_speed
from jaxdistill.evaluate.evaluator import check_finite, make_context
from jaxdistill.evaluate.fill_mask import make_fill_mask
from jaxdistill.evaluate.footprint import measure_peak
from jaxdistill.evaluate.neighbours import frequent_words, nearest_words
from jaxdistill.evaluate.rouge import greedy
from jaxdistill.export.card import without_folders
from jaxdistill.export.origin import Origin
from jaxdistill.jobs.measure import config_of_run
from jaxdistill.models.model import Model, build_model_for, count_params
from jaxdistill.models.pair import Pair
from jaxdistill.models.tokenizer import check_same_vocabulary
from jaxdistill.report.contents import Bin, Curves, Example, Made, Near, Portrait, Report
from jaxdistill.run import folder as folders
from jaxdistill.run.assemble import held_out_of
from jaxdistill.run.best import step_named
from jaxdistill.run.export import held_out_text
from jaxdistill.run.fit import check_model
from jaxdistill.run.models import in_dtype
from jaxdistill.run.origin import read_origin
from jaxdistill.run.records import read_records
from jaxdistill.run.teachers import load_teacher
from jaxdistill.run.training import check_evaluation
from jaxdistill.sampling.generate import make_generator
from jaxdistill.step import sharding

Say = Callable[[str], None]

TEACHER = "teacher"
HELD_OUT_EXAMPLES = 5
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
_AROUND = 12  # tokens on either side of a masked word, or before a continuation, of held-out text
_FREQUENT_WORDS, _LETTERS = 8, 5  # short words are those that every text has
_COUNTED_ROWS = 10_000
_SPEED_LENGTH = 128  # tokens of the row that is timed


class _Side(NamedTuple):
    """A model with its parameters on the host."""

    name: str
    model: Model
    params: PyTree


def make_report(
    workdirs: Sequence[Path],
    *,
    command: str,
    step: str = "last",
    curves_only: bool = False,
    overrides: Sequence[str] = (),
    words: Sequence[str] = (),
    allow_pickle: bool = False,
    say: Say,
) -> Report:
    """Everything that a report shows of these runs.

    All models are measured on the held-out text of the first run, with its masks; the teacher is that of the first run
    which has one. So a run without a teacher is the baseline of a run beside it that has one.

    Args:
      step: of each run's checkpoint, as `step_named` takes it.
      curves_only: loads no model; shows what the runs have written.
      overrides: `--config.KEY=VALUE` flags, which change what the first run is measured on.
      words: whose nearest words to show; () = frequent words of the held-out text.

    Raises:
      UserError: a folder that is no run; runs whose models cannot be compared.
    """
    recorded = {name: _recorded(workdir) for name, workdir in _named(workdirs).items()}
    curves = [_curves(name, read_records(workdir)) for name, workdir in _named(workdirs).items()]
    made = [_made(name, workdir, recorded[name]) for name, workdir in _named(workdirs).items()]
    report = Report(
        title=", ".join(recorded),
        text=held_out_text(next(iter(recorded.values()))),
        when=time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime()),
        command=command,
        versions=_versions(),
        curves=curves,
        made=made,
    )
    if curves_only:
        return report
    config = config_of_run(workdirs[0], overrides)
    report = report._replace(text=held_out_text(config.model_dump(mode="json")))
    return _measured(report, config, _named(workdirs), step=step, words=words, allow_pickle=allow_pickle, say=say)


def _named(workdirs: Sequence[Path]) -> dict[str, Path]:
    """The runs by the names of their folders, or by whole paths where these names are not unlike."""
    names = [workdir.resolve().name for workdir in workdirs]
    unlike = len({TEACHER, *names}) == len(names) + 1
    named = dict(zip(names if unlike else map(str, workdirs), workdirs, strict=True))
    if len(named) < len(workdirs):
        raise UserError("a run is named twice; name each run once")
    return named


def _recorded(workdir: Path) -> dict[str, Any]:
    found = folders.read_config(workdir)
    if found is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    return found


def _curves(name: str, records: Sequence[Mapping[str, Any]]) -> Curves:
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"train": {}, "eval": {}}
    for record in records:
        for figure, value in record.items():
            if figure not in ("step", "time", "kind") and isinstance(value, int | float) and record["kind"] in found:
                found[record["kind"]].setdefault(figure, []).append((record["step"], value))
    return Curves(name, found["train"], found["eval"])


def _made(name: str, workdir: Path, recorded: Mapping[str, Any]) -> Made:
    """How a run was made, without the folders of this machine: a report is there to be passed on."""
    origin = Origin.model_validate(without_folders(read_origin(workdir, recorded).model_dump()))
    defaults = configs.values_of(Config())
    public = without_folders(recorded)
    values = configs.recorded_values(public)
    changed = {key: value for key, value in values.items() if key in defaults and value != defaults[key]}
    changed.pop("data.cache_dir", None)
    return Made(name, f"A student {origin.sentence()}.", changed, json.dumps(public, indent=2))


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "jaxdistill": __version__,
        **packages,
        "Python": platform.python_version(),
        "devices": f"{jax.device_count()} {device.device_kind or device.platform}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _measured(
    report: Report,
    config: Config,
    workdirs: Mapping[str, Path],
    *,
    step: str,
    words: Sequence[str],
    allow_pickle: bool,
    say: Say,
) -> Report:
    """The report with what needs the models themselves."""
    with taking("reading the models"):
        students = [_student(name, workdir, step, say) for name, workdir in workdirs.items()]
        teacher = _teacher(config, workdirs, allow_pickle=allow_pickle)
        sides = ([teacher] if teacher else []) + [side for side, _ in students]
    tokenizer = students[0][1].tokenizer
    for side in sides:
        check_model(config, side.model, side.name)
    for side, student in students:
        if side.model.family.causal != sides[0].model.family.causal:
            raise UserError(f"{side.name} and {sides[0].name}: both must be masked, or both causal")
        check_same_vocabulary(sides[0].model.config, side.model.config, [tokenizer, student.tokenizer])
    sources = texts.open_text(config.data)
    causal = sides[0].model.family.causal
    text = texts.prepare_text(config.data, sources, tokenizer, causal=causal, report=say)
    neighbours = _neighbours(sides, tokenizer, text, words)
    length = min(_SPEED_LENGTH, *(side.model.max_length for side in sides))
    measure = partial(_portrait, config, teacher, tokenizer, text, length=length, say=say)
    portraits = [measure(side) for side in sides]
    say("asking the models for examples")
    shown = _continued if causal else _filled
    return report._replace(
        portraits=portraits,
        has_teacher=teacher is not None,
        examples=shown(config, sides, tokenizer, text),
        neighbours=neighbours,
        measured_how=_how_measured(length),
    )


def _student(name: str, workdir: Path, step: str, say: Say) -> tuple[_Side, folders.Student]:
    try:
        student = folders.load_student(workdir, step=step_named(workdir, step), report=say)
    except UserError as error:
        raise UserError(f"{error}; --curves-only shows what the run has written") from error
    own = recipe.recorded(student.config, ())
    return _Side(name, build_model_for(student.model.config, own.student), jax.device_get(student.params)), student


def _teacher(config: Config, workdirs: Mapping[str, Path], *, allow_pickle: bool) -> _Side | None:
    """The teacher of the first run, or of the first one that has a teacher."""
    for own in (config, *(config_of_run(workdir, ()) for workdir in workdirs.values())):
        model, params = load_teacher(own, allow_pickle=allow_pickle)
        if model is not None:
            return _Side(TEACHER, model, in_dtype(params, own.teacher.dtype))
    return None


def _portrait(
    config: Config, teacher: _Side | None, tokenizer: Any, text: Text, side: _Side, *, length: int, say: Say
) -> Portrait:
    """A model measured by itself, and beside the teacher if it is another."""
    say(f"measuring {side.name}")
    other = None if teacher is side else teacher
    speed = measure_speed(side.model, side.params, rows=1, length=length)
    dtype = jax.tree.leaves(side.params)[0].dtype
    peak = measure_peak(side.model, dtype=dtype, rows=1, length=length)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    check_evaluation(config, mesh)
    params: tuple[PyTree, PyTree] = (side.params, {} if other is None else other.params)
    pair = Pair(side.model, params[0], other and other.model, params[1], tokenizer, None)
    context = make_context(config.evaluate, config.mask, pair, text, held_out_of(config, text), mesh=mesh)
    params = jax.device_put(params, sharding.replicated(mesh))
    found = make_comparison(context)(*params)
    entries = count_params(side.params)
    sizes = {"parameters": entries, "bytes": 4 * entries, "latency": 1e3 * speed.seconds, "memory": speed.memory}
    sizes |= {} if peak is None else {"peak": peak}
    figures = {name: float(value) for name, value in {**sizes, **found.figures}.items()}
    check_finite(figures, of=lambda: side.name)
    model = side.model
    what = f"{model.config.model_type}, {model.num_layers} layers of width {model.width}"
    similarity = None if other is None else layer_similarity(context, *params)
    return Portrait(side.name, what, figures, [Bin(*one) for one in found.calibration], similarity)


def _how_measured(length: int) -> str:
    device = jax.devices()[0]
    return f"one row of {length} tokens on one {device.device_kind or device.platform}"


def _neighbours(sides: Sequence[_Side], tokenizer: Any, text: Text, words: Sequence[str]) -> list[Near]:
    """The nearest words of the words that were asked for, or of frequent ones of the held-out text."""
    if not words:
        ids = [text.held_out[i].tolist() for i in range(min(_COUNTED_ROWS, len(text.held_out)))]
        words = frequent_words(
            tokenizer.batch_decode(ids, skip_special_tokens=True), most=_FREQUENT_WORDS, letters=_LETTERS
        )
    found = {side.name: nearest_words(side.model, side.params, tokenizer, words) for side in sides}
    return [Near(word, {name: near[i] for name, near in found.items()}) for i, word in enumerate(words)]


def _filled(config: Config, sides: Sequence[_Side], tokenizer: Any, text: Text) -> list[Example]:
    """The words that each model puts into masked texts: those of evaluate.prompts, and held-out ones."""
    asked = [(prompt, "") for prompt in config.evaluate.prompts] + _masked_texts(config, tokenizer, text)
    prompts = [prompt for prompt, _ in asked]
    answers = {side.name: make_fill_mask(side.model, tokenizer, prompts)(side.params) for side in sides}
    return [
        Example(prompt, expected, words={name: found[i] for name, found in answers.items()})
        for i, (prompt, expected) in enumerate(asked)
    ]


def _masked_texts(config: Config, tokenizer: Any, text: Text) -> list[tuple[str, str]]:
    """(text with [MASK], the masked word) of held-out rows: one word of each, with the words around it."""
    special, found = set(text.vocabulary.special), []
    for batch in held_out_of(config, text):
        original = np.where(batch["label_mask"], batch["labels"], batch["input_ids"])
        for row, real, drawn in zip(original, batch["attention_mask"], batch["label_mask"], strict=True):
            ids = row[real]
            for at in np.flatnonzero(drawn).tolist():
                word = tokenizer.decode([int(ids[at])]).strip()
                if len(word) > 2 and word.isalpha() and not _is_part(tokenizer, ids, at):
                    found.append((_around(tokenizer, ids, at, special), word))
                    break
            if len(found) == HELD_OUT_EXAMPLES:
                return found
    return found


def _is_part(tokenizer: Any, ids: np.ndarray, at: int) -> bool:
    """Whether a token is a part of a longer word, which a reader could not guess."""
    pairs = [tokenizer.decode([int(id) for id in ids[i : i + 2]]) for i in (at - 1, at)]
    return any(len(pair.split()) < 2 and pair.strip().isalpha() for pair in pairs)


def _around(tokenizer: Any, ids: np.ndarray, at: int, special: Collection[int]) -> str:
    """The text around a masked token, from whole word to whole word."""
    before, after = ids[max(at - _AROUND, 0) : at], ids[at + 1 : at + 1 + _AROUND]
    sides = [tokenizer.decode([int(id) for id in side if id not in special]).split() for side in (before, after)]
    first = sides[0][1:] if at > _AROUND else sides[0]  # the first word and the last one may be cut
    last = sides[1][:-1] if at + 1 + _AROUND < len(ids) else sides[1]
    return " ".join([*first, "[MASK]", *last])


def _continued(config: Config, sides: Sequence[_Side], tokenizer: Any, text: Text) -> list[Example]:
    """What each model writes after prompts: those of evaluate.prompts, and held-out ones."""
    new = config.evaluate.max_new_tokens
    most = min(side.model.max_length for side in sides) - new
    own = zip(config.evaluate.prompts, prompt_ids(tokenizer, config.evaluate.prompts), strict=True)
    asked = [(prompt, ids, "") for prompt, ids in own] + _held_out_prompts(tokenizer, text, new=new)
    asked = [one for one in asked if 1 <= len(one[1]) <= most]
    if not asked:
        return []
    prompts, answers = [ids for _, ids, _ in asked], {}
    for side in sides:
        decoding = greedy(config.evaluate, side.model, tokenizer)
        generate = make_generator(side.model, decoding=decoding, batch_size=len(prompts))
        completions = generate(side.params, prompts, jax.random.key(0))
        answers[side.name] = tokenizer.batch_decode([list(one.tokens) for one in completions], skip_special_tokens=True)
    return [
        Example(prompt, expected, texts={name: written[i].strip() for name, written in answers.items()})
        for i, (prompt, _, expected) in enumerate(asked)
    ]


def _held_out_prompts(tokenizer: Any, text: Text, *, new: int) -> list[tuple[str, list[int], str]]:
    """(prompt, its ids, how it goes on) of held-out prompts, or of the beginnings of held-out rows."""
    pairs = pairs_of(text.held_out, limit=HELD_OUT_EXAMPLES)
    if not pairs:
        rows = [text.held_out[i].tolist() for i in range(min(HELD_OUT_EXAMPLES, len(text.held_out)))]
        pairs = [(row[:_AROUND], row[_AROUND : _AROUND + new]) for row in rows if len(row) > _AROUND]
    decode = tokenizer.batch_decode
    prompts = decode([prompt for prompt, _ in pairs], skip_special_tokens=True)
    expected = decode([answer[:new] for _, answer in pairs], skip_special_tokens=True)
    return [(prompt, ids, answer.strip()) for prompt, (ids, _), answer in zip(prompts, pairs, expected, strict=True)]
