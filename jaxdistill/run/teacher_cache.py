"""A run that reads its teacher's answers from a cache: the cache is opened, and checked to be of this run.

Everything that does not fit is refused by name before the first step. The teacher's weights are not read.
"""

from collections.abc import Callable, Iterator, Mapping
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
from jaxdistill.losses.term import Objective, Term
from jaxdistill.losses.terms import needs_teacher_head, row_of, teacher_layers
from jaxdistill.models import hub
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.fingerprint import weights_fingerprint
from jaxdistill.models.model import Model
from jaxdistill.models.pair import CachedTeacher, Pair
from jaxdistill.models.tokenizer import load_tokenizer

AT_ONCE = 1024  # rows that are looked up at a time


def folder_of(config: Config) -> Path:
    """The folder of the cache."""
    return named_path(config.teacher.cache, key="config.teacher.cache")


def teacher_folder(config: Config) -> Path:
    """The folder with the configuration and the tokenizer of the cache's teacher.

    Raises:
      UserError: there is none.
    """
    folder = folder_of(config) / caches.TEACHER
    if not folder.is_dir():
        raise UserError(
            f"teacher cache {config.teacher.cache!r} has no folder {caches.TEACHER}/ with the teacher's config.json "
            "and tokenizer; put it there, as docs/cache.md says"
        )
    return folder


def cached_teacher(config: Config) -> CachedTeacher:
    """The teacher of the cache: its configuration alone.

    Raises:
      UserError: the cache cannot be read, or is of another teacher than config.teacher.name.
    """
    meta = caches.read_meta(folder_of(config))
    _check_teacher(config, meta)
    fields = hub.load_config(teacher_folder(config))
    model = Model(None, fields, FAMILIES[fields.model_type])  # never computed, so no class has to follow it
    if meta.words > model.vocab_size:
        raise UserError(
            f"teacher cache {config.teacher.cache!r} is damaged: its answers are over {meta.words:,} words, and its "
            f"teacher has {model.vocab_size:,}"
        )
    return CachedTeacher(model, meta.words)


def recorded_teacher(config: Config) -> TeacherRecord:
    """What a cache says of its teacher."""
    return caches.read_meta(folder_of(config)).teacher


def content_of(config: Config) -> dict[str, Any]:
    """What decides on the answers of a cache, for the record of a run."""
    return caches.read_meta(folder_of(config)).model_dump(mode="json", exclude={"texts"})


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


def open_for_run(config: Config, pair: Pair, objective: Objective, text: Text) -> TeacherCache:
    """The cache of a run, with answers for every example that can come.

    Raises:
      UserError: names what the cache does not hold, or what is of another teacher, tokenizer, text or temperature.
    """
    cache = caches.open_cache(folder_of(config))
    _check_tokenizer(config, pair)
    assert pair.imitated is not None
    _check_losses(config, cache.meta, objective, pair.imitated)
    with taking("looking up the teacher's answers"):
        _check_text(config, cache, text)
    return cache


def answers_of(
    config: Config, pair: Pair, objective: Objective, cache: TeacherCache
) -> Callable[[HostBatch], HostBatch]:
    """Puts the answers that the losses use beside a batch."""
    meta, teacher = cache.meta, pair.imitated
    assert teacher is not None
    layers, _ = teacher_layers(objective, last=teacher.num_layers)
    logits = needs_teacher_head(objective)
    tokens: Any = objective.tokens
    temperature = 0 if meta.whole or not logits else meta.temperatures.index(config.loss.temperature)
    fraction, group = config.mask.fraction, config.mask.group

    def add(batch: HostBatch) -> HostBatch:
        width = batch["input_ids"].shape[1]
        capacity = masked_capacity(fraction=fraction, group=group, width=width) if tokens == "masked" else 0
        return caches.with_answers(
            cache, batch, Wanted(tokens, temperature, logits, tuple(sorted(layers)), capacity=capacity)
        )

    return add


def answer_shapes(config: Config, pair: Pair, objective: Objective, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the arrays that a cache adds to a batch of these shapes.

    Raises:
      UserError: the cache cannot serve the losses.
    """
    cache, teacher = caches.open_cache(folder_of(config)), pair.imitated
    assert teacher is not None
    _check_losses(config, cache.meta, objective, teacher)
    empty = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
    filled = answers_of(config, pair, objective, cache)(empty)
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


def _check_teacher(config: Config, meta: Meta) -> None:
    named, recorded = config.teacher, meta.teacher
    if not named.name:
        return
    key = f"config.teacher.cache={named.cache!r}"
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


def _check_tokenizer(config: Config, pair: Pair) -> None:
    if not config.tokenizer.name:  # then it is the cache's own
        return
    if load_tokenizer(teacher_folder(config)).get_vocab() != pair.tokenizer.get_vocab():
        raise UserError(
            f"config.teacher.cache={config.teacher.cache!r} is of another tokenizer than config.tokenizer.name="
            f"{config.tokenizer.name!r}: their vocabularies differ; set config.tokenizer.name to '', which takes the "
            "cache's"
        )


def _check_losses(config: Config, meta: Meta, objective: Objective, teacher: Model) -> None:
    key = f"config.teacher.cache={config.teacher.cache!r}"
    for name in objective.weights:
        row = row_of(objective, name)
        if row.needs_teacher and (reason := _not_served(config, meta, objective, name, row, teacher)):
            raise UserError(f"{key} cannot serve config.loss.alpha_{name}: {reason}")
    if needs_teacher_head(objective):
        if objective.tokens not in ("all", "labels", "masked"):
            raise UserError(f"{key} has no answers for config.loss.tokens={objective.tokens}; set it to all or labels")
        if objective.tokens == "all" and meta.tokens == "labels":
            raise UserError(
                f"{key} has answers for the predicted tokens alone, and config.loss.tokens=all compares all; set "
                "config.loss.tokens=labels (masked LMs: masked), or make a cache with a config that sets it to all"
            )
    if meta.layers and meta.width != teacher.width:
        raise UserError(f"{key} is damaged: hidden states of width {meta.width}, of a teacher of {teacher.width}")


def _not_served(config: Config, meta: Meta, objective: Objective, name: str, row: Term, teacher: Model) -> str:
    """Why the cache cannot serve a loss; "" where it can."""
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


def _check_text(config: Config, cache: TeacherCache, text: Text) -> None:
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
            f"config.teacher.cache={config.teacher.cache!r} lacks the answers of {missing:,} of {missing + found:,} "
            f"examples of this run: {_what_differs(record, cache.meta)}; run `jaxdistill cache` with this config "
            "and the same --out, which adds what is missing"
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
