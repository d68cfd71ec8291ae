"""A run that reads its teacher's answers from a cache: the cache is opened, and checked to be of this run.

Everything that does not fit is refused by name before the first step. The teacher's weights are not read. Of several
caches, one for each of several teachers, every one is checked alike, and all answers stand beside a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.config import Config
from jaxdistill.console import taking
from jaxdistill.data import teacher_cache as caches
from jaxdistill.data.batching import HostBatch
from jaxdistill.data.masking import masked_capacity
from jaxdistill.data.pipeline import batches_in_order
from jaxdistill.data.store import content_of as content_of_text
from jaxdistill.data.teacher_cache import Meta, TeacherCache, TeacherRecord, Wanted
from jaxdistill.data.text import Text, masks_of_content
from jaxdistill.errors import UserError
from jaxdistill.files import named_path
from jaxdistill.losses.divergences import DIVERGENCES, ByWriter
from jaxdistill.losses.partial import PARTIAL
from jaxdistill.losses.term import Objective
from jaxdistill.losses.terms import needs_teacher_head, row_of, teacher_layers
from jaxdistill.models import hub
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.fingerprint import weights_fingerprint
from jaxdistill.models.model import Model
from jaxdistill.models.pair import CachedTeacher, Pair
from jaxdistill.models.tokenizer import load_tokenizer

AT_ONCE = 1024  # rows that are looked up at a time


def teacher_folder(cache: str) -> Path:
    """The folder with the configuration and the tokenizer of a cache's teacher.

    Raises:
      UserError: there is none.
    """
    folder = _folder(cache) / caches.TEACHER
    if not folder.is_dir():
        raise UserError(
            f"teacher cache {cache!r} has no folder {caches.TEACHER}/ with the teacher's config.json and tokenizer; "
            "put it there, as docs/cache.md says"
        )
    return folder


def _folder(cache: str) -> Path:
    return named_path(cache, key="config.teacher.cache")


def cached_teachers(config: Config) -> list[CachedTeacher]:
    """The teachers of the caches: their configurations alone.

    Raises:
      UserError: a cache cannot be read, is of another teacher than config.teacher.name, or of other words than the
        first.
    """
    names = config.teacher.caches
    metas = [caches.read_meta(_folder(name)) for name in names]
    _check_teacher(config, names[0], metas[0])
    for name, meta in zip(names, metas, strict=True):
        if meta.words != metas[0].words:
            raise UserError(
                f"config.teacher.cache: {name!r} has answers over {meta.words:,} words, and {names[0]!r} over "
                f"{metas[0].words:,}; make both with a student of the same vocabulary"
            )
    return [_cached_teacher(name, meta) for name, meta in zip(names, metas, strict=True)]


def _cached_teacher(cache: str, meta: Meta) -> CachedTeacher:
    fields = hub.load_config(teacher_folder(cache))
    model = Model(None, fields, FAMILIES[fields.model_type])  # never computed, so no class has to follow it
    if meta.words > model.vocab_size:
        raise UserError(
            f"teacher cache {cache!r} is damaged: its answers are over {meta.words:,} words, and its teacher has "
            f"{model.vocab_size:,}"
        )
    return CachedTeacher(model, meta.words)


def recorded_teachers(config: Config) -> list[TeacherRecord]:
    """What the caches say of their teachers."""
    return [caches.read_meta(_folder(cache)).teacher for cache in config.teacher.caches]


def content_of(config: Config) -> Any:
    """What decides on the answers of a cache, or a list of that for several, for the record of a run."""
    contents = [
        caches.read_meta(_folder(cache)).model_dump(mode="json", exclude={"texts"}) for cache in config.teacher.caches
    ]
    return contents if len(contents) > 1 else contents[0]


def check_words(config: Config, cached: CachedTeacher, student: Model) -> None:
    """Checks that the student has all words that the answers are over.

    Raises:
      UserError: it has fewer.
    """
    if cached.words > student.vocab_size:
        raise UserError(
            f"config.teacher.cache={config.teacher.cache!r} has answers over {cached.words:,} words, and the student "
            f"has {student.vocab_size:,}; make a cache with the config of this student"
        )


def open_for_run(config: Config, pair: Pair, objective: Objective, text: Text) -> list[TeacherCache]:
    """The caches of a run, with answers for every example that can come.

    Raises:
      UserError: names what a cache does not hold, or what is of another teacher, tokenizer, text or temperature.
    """
    opened = [caches.open_cache(_folder(cache)) for cache in config.teacher.caches]
    for name, cache in zip(config.teacher.caches, opened, strict=True):
        _check_tokenizer(config, name, pair)
        _check_losses(config, name, cache.meta, objective, pair)
    with taking("looking up the teacher's answers"):
        for name, cache in zip(config.teacher.caches, opened, strict=True):
            _check_text(config, name, cache, text)
    return opened


def answers_of(
    config: Config, pair: Pair, objective: Objective, opened: Sequence[TeacherCache]
) -> Callable[[HostBatch], HostBatch]:
    """Puts the answers that the losses use beside a batch: those of all caches, hidden states of the first alone."""
    teacher = pair.imitated
    assert teacher is not None
    layers, _ = teacher_layers(objective, last=teacher.num_layers)
    logits = needs_teacher_head(objective)
    tokens: Any = objective.tokens
    fraction, group = config.mask.fraction, config.mask.group

    def temperature(meta: Meta) -> int:
        return 0 if meta.whole or not logits else meta.temperatures.index(config.loss.temperature)

    of_each = [
        Wanted(tokens, temperature(cache.meta), logits, () if i else tuple(sorted(layers)), number=i)
        for i, cache in enumerate(opened)
    ]

    def add(batch: HostBatch) -> HostBatch:
        width = batch["input_ids"].shape[1]
        capacity = masked_capacity(fraction=fraction, group=group, width=width) if tokens == "masked" else 0
        for cache, wanted in zip(opened, of_each, strict=True):
            batch = caches.with_answers(cache, batch, wanted._replace(capacity=capacity))
        return batch

    return add


def answer_shapes(config: Config, pair: Pair, objective: Objective, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the arrays that caches add to a batch of these shapes.

    Raises:
      UserError: a cache cannot serve the losses.
    """
    opened = [caches.open_cache(_folder(cache)) for cache in config.teacher.caches]
    for name, cache in zip(config.teacher.caches, opened, strict=True):
        _check_losses(config, name, cache.meta, objective, pair)
    empty = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
    filled = answers_of(config, pair, objective, opened)(empty)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in filled.items() if name not in batch}


def text_record(config: Config, text: Text) -> dict[str, Any]:
    """What decides on the examples of a run: its text, and its masks."""
    record: dict[str, Any] = {"text": content_of_text(text.train), "rows": len(text.train)}
    if text.causal:
        return record | {"prompt_loss": config.data.prompt_loss}
    counts = np.ascontiguousarray(text.token_counts, "<i8").tobytes().hex() if config.mask.smoothing else ""
    masks = {name: getattr(config.mask, name) for name in ("fraction", "smoothing", "epochs", "seed")}
    return record | masks | {"replace": list(config.mask.replace), "counts": caches.digest_text(counts)}


def passes(config: Config, text: Text, *, rows: int) -> Iterator[Iterator[HostBatch]]:
    """The training text in order, once for each epoch with masks of its own, `rows` rows at a time.

    Raises:
      UserError: masks are new in every epoch.
    """
    for make in masks_of_content(text, config.data, config.mask):
        yield iter(batches_in_order(make, text.train, config.data, batch_size=rows, limit=0, own_rows=slice(0, rows)))


def _key(cache: str) -> str:
    return f"config.teacher.cache={cache!r}"


def _check_teacher(config: Config, cache: str, meta: Meta) -> None:
    """Checks that the first cache is of the teacher that config.teacher.name names."""
    named, recorded = config.teacher, meta.teacher
    if not named.name:
        return
    key = _key(cache)
    advice = "name that teacher, or set config.teacher.name to '', which goes by the cache alone"
    folder = named_path(named.name)
    if folder.is_dir():
        if recorded.fingerprint and weights_fingerprint(folder) != recorded.fingerprint:
            raise UserError(
                f"{key} is of another teacher than config.teacher.name={named.name!r}: the weights of "
                f"{recorded.name!r} have another fingerprint; {advice}"
            )
    elif (named.name, named.revision) != (recorded.name, recorded.revision):
        of = f"{recorded.name!r}{f' at revision {recorded.revision!r}' if recorded.revision else ''}"
        asked = f"{named.name!r}{f' at revision {named.revision!r}' if named.revision else ''}"
        raise UserError(f"{key} is of the teacher {of}, and config.teacher.name is {asked}; {advice}")


def _check_tokenizer(config: Config, cache: str, pair: Pair) -> None:
    named, first = config.tokenizer.name, config.teacher.caches[0]
    if not named and cache == first:  # then it is the cache's own
        return
    if load_tokenizer(teacher_folder(cache)).get_vocab() != pair.tokenizer.get_vocab():
        other = f"config.tokenizer.name={named!r}" if named else repr(first)
        advice = "set config.tokenizer.name to '', which takes the cache's" if named else "name caches of one tokenizer"
        raise UserError(f"{_key(cache)} is of another tokenizer than {other}: their vocabularies differ; {advice}")


def _check_losses(config: Config, cache: str, meta: Meta, objective: Objective, pair: Pair) -> None:
    """Checks that a cache serves the losses; those on hidden states are of the first cache."""
    key, teacher, is_first = _key(cache), pair.imitated, cache == config.teacher.caches[0]
    assert teacher is not None
    seen = {name: w for name, w in objective.weights.items() if is_first or row_of(objective, name).sees == "logits"}
    if reason := cannot_serve(config, meta, objective._replace(weights=seen), teacher):
        raise UserError(f"{key} {reason}")
    if is_first and meta.layers and meta.width != teacher.width:
        raise UserError(f"{key} is damaged: hidden states of width {meta.width}, of a teacher of {teacher.width}")


def cannot_serve(config: Config, meta: Meta, objective: Objective, teacher: Model) -> str:
    """Why a cache of a teacher cannot serve the losses, to follow its name; "" where it can."""
    for name in objective.weights:
        if row_of(objective, name).needs_teacher and (reason := _not_served(config, meta, objective, name, teacher)):
            return f"cannot serve config.loss.alpha_{name}: {reason}"
    if needs_teacher_head(objective):
        if objective.tokens not in ("all", "labels", "masked"):
            return f"has no answers for config.loss.tokens={objective.tokens}; set it to all or labels"
        if objective.tokens == "all" and meta.tokens == "labels":
            return (
                "has answers for the predicted tokens alone, and config.loss.tokens=all compares all; set "
                "config.loss.tokens=labels (masked LMs: masked), or make a cache with a config that sets it to all"
            )
    return ""


def _not_served(config: Config, meta: Meta, objective: Objective, name: str, teacher: Model) -> str:
    """Why a cache cannot serve a loss; "" where it can."""
    row = row_of(objective, name)
    if row.on_logits is not None:
        loss = row.on_logits(objective)
        if isinstance(loss, ByWriter):
            return "it has a side for what the student writes, and a cache no answers there; take another divergence"
        if loss.target == "labels":
            return ""
        if loss not in DIVERGENCES.values():
            return "it compares logits, and a cache holds probabilities; set it to 0"
        if meta.whole:
            return ""
        if objective.mix and objective.mix.combine == "probabilities":
            return (
                "config.teacher.combine=probabilities needs the teachers' probabilities of every word, and the kind "
                f"{meta.kind} holds those of {meta.k or 'no'} words of {meta.words:,}; set combine to losses, or make "
                f"a cache of kind topk with cache.k={meta.words}"
            )
        if loss.name not in PARTIAL:
            return (
                f"config.loss.divergence={loss.name} needs the teacher's probability of every word, and the kind "
                f"{meta.kind} holds those of {meta.k or 'no'} words of {meta.words:,}; set it to forward_kl, or make a "
                f"cache of kind topk with cache.k={meta.words}"
            )
        wanted = {config.loss.temperature, config.loss.ends.get("temperature", config.loss.temperature)}
        if len(wanted) > 1:
            return f"its answers are for fixed temperatures, and config.loss.end moves it; there are {_listed(meta)}"
        if config.loss.temperature not in meta.temperatures:
            return (
                f"config.loss.temperature={config.loss.temperature:g}, and the answers are for {_listed(meta)}; set "
                f"one of these, or make a cache with cache.temperatures=({config.loss.temperature:g},)"
            )
        return ""
    if row.sees == "hidden_states":
        layers, _ = teacher_layers(objective._replace(weights={name: 1.0}), last=teacher.num_layers)
        if absent := sorted(i - 1 for i in layers - set(meta.layers)):
            there = ", ".join(str(i - 1) for i in meta.layers) or "no layer"
            return (
                f"it needs the hidden states of the teacher's layers {', '.join(map(str, absent))}, and the cache has "
                f"those of {there}; name them in cache.layers, or set the loss to 0"
            )
        return ""
    return f"it compares {row.sees}, which no cache holds; set it to 0"


def _listed(meta: Meta) -> str:
    return ", ".join(f"{t:g}" for t in meta.temperatures)


def _check_text(config: Config, name: str, cache: TeacherCache, text: Text) -> None:
    record = text_record(config, text)
    every = passes(config, text, rows=AT_ONCE)  # raises for masks that are new in every epoch
    if record in cache.meta.texts:
        return
    found = missing = 0
    for batches in every:
        for batch in batches:
            for example in caches.examples_of(batch, cache.meta):
                if cache.find(example.key) is None:
                    missing += 1
                else:
                    found += 1
    if missing:
        raise UserError(
            f"{_key(name)} lacks the answers of {missing:,} of {missing + found:,} examples of this run: "
            f"{_what_differs(record, cache.meta)}; run `jaxdistill cache` with this config and the same --out, which "
            "adds what is missing"
        )


def _what_differs(record: Mapping[str, Any], meta: Meta) -> str:
    if not meta.texts:
        return "it is not finished"
    same_text = [known for known in meta.texts if known.get("text") == record["text"]]
    if not same_text:
        return "it is of another text, or of this one prepared otherwise"
    known = same_text[-1]
    differ = [name for name in record if record[name] != known.get(name) and name != "counts"]
    said = [f"{name} was {known.get(name)} and is {record[name]}" for name in differ]
    return f"the same text with other examples ({', '.join(said) or 'other token counts'})"
