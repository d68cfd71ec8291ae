"""A teacher's answers on the text of a config, computed once and kept in a folder.

The folder grows by shards, each of which appears whole or not at all. What a stopped process had not yet written is
computed by the next one; examples that are there already, of this text or another, are not computed again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import config as configs
from jaxdistill import processes
from jaxdistill.config import Config
from jaxdistill.console import taking
from jaxdistill.data import teacher_cache as caches
from jaxdistill.data import text as texts
from jaxdistill.data.batching import EMPTY, HostBatch, buckets_of, plan_epoch
from jaxdistill.data.masking import masked_capacity
from jaxdistill.data.teacher_cache import Example, Meta, TeacherRecord
from jaxdistill.data.text import Text, masks_of_content
from jaxdistill.errors import UserError
from jaxdistill.files import named_path, writing
from jaxdistill.models import hub, stored
from jaxdistill.models.fingerprint import weights_fingerprint
from jaxdistill.models.model import Model, common_words
from jaxdistill.models.tokenizer import check_tokenizer, end_texts_alike, load_tokenizer
from jaxdistill.run.models import pair_of_shapes
from jaxdistill.run.teacher_cache import AT_ONCE, text_record
from jaxdistill.run.teachers import load_teacher
from jaxdistill.run.training import check_devices
from jaxdistill.step import sharding
from jaxdistill.step.answers import make_answer

SHARD_BYTES = 1 << 28  # of answers, after which a shard is written
SHARD_SECONDS = 600.0  # after which it is written anyway, so that little is lost where the process ends
REPORT_SECONDS = 10.0

Report = Callable[[str], None]


class Made(NamedTuple):
    """What a cache holds now."""

    out: Path
    examples: int
    added: int  # of these, by this call
    bytes_per_token: int  # of answers, without hidden states and keys
    size: int  # bytes of all files

    def lines(self) -> list[str]:
        added = f", {self.added:,} of them new" if self.added < self.examples else ""
        return [
            f"{self.examples:,} examples{added}, {self.bytes_per_token} bytes a token, {self.size:,} bytes in all",
            str(self.out),
        ]

    def values(self) -> dict[str, Any]:
        return {**self._asdict(), "out": str(self.out)}


def make_cache(config: Config, out: Path, *, allow_pickle: bool, report: Report) -> Made:
    """Runs the teacher over the training text, and keeps its answers in `out`; goes on with what is there.

    Raises:
      UserError: what does not fit, before any text is read and anything is compiled; `out` holds something else.
    """
    out = named_path(str(out))
    if config.teacher.also:
        report(f"config.teacher.also={config.teacher.also!r} is left out: a cache is of config.teacher.name alone")
    config = config.changed(teacher={"cache": "", "also": (), "weights": ()})
    configs.check(config)
    if not config.teacher.name:
        raise UserError("config.teacher.name is empty, so there is nobody to answer; name a teacher")
    if config.samples:
        raise UserError("text that models write in a run has no answers in a cache; set config.sample to 0")
    if config.teacher.devices:
        raise UserError("the teacher runs alone, on all devices; set config.teacher.devices and student.devices to 0")
    if config.loss.tokens not in ("all", "labels", "masked"):
        raise UserError(f"a cache is for the tokens that config.loss.tokens={config.loss.tokens} does not choose")
    meshes = sharding.make_meshes(config.mesh, student=0, teacher=0)
    check_devices(config, meshes)
    sources = texts.open_text(config.data)
    pair = pair_of_shapes(config)  # the student decides on the words that are compared
    assert pair.teacher is not None
    folder = hub.resolve(config.teacher.name, revision=config.teacher.revision, allow_pickle=allow_pickle)
    tokenizer = _tokenizer(config, folder, pair.teacher)
    words = common_words(pair.teacher, pair.student)
    meta = meta_of(config, pair.teacher, words=words, fingerprint=weights_fingerprint(folder))
    if (out / caches.META).exists():
        _check_same(out, meta, tokenizer)
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out {out} holds something else than a cache; name an empty or a new folder")
    text = texts.prepare_text(config.data, sources, tokenizer, causal=pair.teacher.family.causal, report=report)
    masks_of_content(text, config.data, config.mask)  # raises for masks that are new in every epoch
    with _held(out):
        if jax.process_index() == 0 and not (out / caches.META).exists():
            with writing(out):
                pair.teacher.config.save_pretrained(out / caches.TEACHER)
                tokenizer.save_pretrained(out / caches.TEACHER)
            caches.write_meta(out, meta)
        processes.wait("cache: begun")
        return _filled(config, out, text, meta, allow_pickle=allow_pickle, report=report)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """One process, or the processes of one job, write a cache at a time."""
    lock = filelock.FileLock(out / ".lock")
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                lock.acquire(blocking=False)
        yield
    except filelock.Timeout:
        raise UserError(f"--out {out} is being written by another process; wait for it to end") from None
    finally:
        lock.release()


def _tokenizer(config: Config, folder: Path, teacher: Model) -> Any:
    named = config.tokenizer
    tokenizer = load_tokenizer(hub.resolve(named.name, revision=named.revision) if named.name else folder)
    check_tokenizer(tokenizer, teacher.config)
    if teacher.family.causal:
        end_texts_alike(tokenizer, teacher.config)
    return tokenizer


def meta_of(config: Config, teacher: Model, *, words: int, fingerprint: str) -> Meta:
    """What the cache of a config is.

    Raises:
      UserError: config.cache.layers holds a layer that is not there.
    """
    cache, causal = config.cache, teacher.family.causal
    for layer in cache.layers:
        if not -1 <= layer < teacher.num_layers:
            raise UserError(
                f"config.cache.layers={cache.layers} holds {layer}; there are layers -1 to {teacher.num_layers - 1}"
            )
    return Meta(
        kind=cache.kind,
        tokens="all" if config.loss.tokens == "all" else "labels",
        words=words,
        temperatures=cache.temperatures or (config.loss.temperature,),
        k=min(cache.k, words) if "topk" in cache.kind else 0,
        samples=cache.samples if "sampled" in cache.kind else 0,
        values=cache.dtype,
        layers=tuple(sorted({layer + 1 for layer in cache.layers})),
        width=teacher.width if cache.layers else 0,
        teacher=TeacherRecord(
            name=config.teacher.name,
            revision=config.teacher.revision,
            fingerprint=fingerprint,
            dtype=config.teacher.dtype,
        ),
        causal=causal,
    )


def _check_same(out: Path, meta: Meta, tokenizer: Any) -> None:
    """Checks that a cache that is there is of the same teacher, tokenizer and settings."""
    there = caches.read_meta(out)
    for name, value in meta:
        was = getattr(there, name)
        if name != "texts" and was != value and not _same_weights(name, was, value):
            raise UserError(
                f"--out {out} holds a cache with {name}={_said(was)}, and this config asks for {_said(value)}; name "
                "another --out, or repeat that config"
            )
    if load_tokenizer(out / caches.TEACHER).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--out {out} holds a cache of another tokenizer; name another --out")


def _same_weights(name: str, was: Any, value: Any) -> bool:
    return name == "teacher" and was.fingerprint == value.fingerprint != "" and was.dtype == value.dtype


def _said(value: Any) -> str:
    return str(value.name) if isinstance(value, TeacherRecord) else str(value)


def _filled(config: Config, out: Path, text: Text, meta: Meta, *, allow_pickle: bool, report: Report) -> Made:
    cache = caches.open_cache(out)
    before = len(cache)
    with taking("looking up what is there already"):
        known = {key.tobytes() for shard in cache.shards for key in shard.keys}
        todo = _todo(config, text, meta, known)
    processes.wait("cache: looked up")  # before anyone writes, so that all have found the same
    tokens = sum(int(text.train.lengths[rows].sum()) for rows in todo)
    if tokens:
        with taking("reading the teacher"):
            teacher, params = load_teacher(config, allow_pickle=allow_pickle)
        assert teacher is not None
        writer = _Writer(out, meta, known)
        progress = _Progress(tokens, report)
        try:
            for batch, found in _answered(config, text, meta, teacher, params, todo):
                writer.add(batch, found)
                progress.add(int(batch["attention_mask"].sum()))
        finally:
            writer.write()  # also where the process is interrupted
    processes.wait("cache: written")
    if jax.process_index() == 0:
        record = text_record(config, text)
        there = caches.read_meta(out)
        if record not in there.texts:
            caches.write_meta(out, there.model_copy(update={"texts": [*there.texts, record]}))
    now = caches.open_cache(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Made(out, len(now), len(now) - before, caches.bytes_per_token(meta), size)


def _todo(config: Config, text: Text, meta: Meta, known: set[bytes]) -> list[np.ndarray]:
    """For each epoch with masks of its own, the rows with examples that are not known; equal examples once."""
    seen = set(known)
    todo = []
    for make in masks_of_content(text, config.data, config.mask):
        missing = []
        for start in range(0, len(text.train), AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, len(text.train)))
            width = int(text.train.lengths[rows].max())
            for example in caches.examples_of(make(0, rows, width), meta):
                if example.key not in seen:
                    seen.add(example.key)
                    missing.append(start + example.row)
        todo.append(np.unique(np.asarray(missing, np.int64)))
    return todo


def _answered(
    config: Config, text: Text, meta: Meta, teacher: Model, params: Any, todo: list[np.ndarray]
) -> Iterator[tuple[HostBatch, dict[str, np.ndarray]]]:
    """(batch, answers) of this host's rows, batch after batch; a batch is computed while the one before is taken."""
    mesh = sharding.make_meshes(config.mesh, student=0, teacher=0).student
    shardings = sharding.by_rule(params, mesh, family=teacher.family)
    gathered = meta.tokens == "labels" and not text.causal
    fraction = config.mask.fraction
    answer = make_answer(
        teacher,
        meta,
        capacity=(lambda width: masked_capacity(fraction=fraction, group=1, width=width)) if gathered else None,
        mesh=mesh,
        shardings=shardings,
    )
    on_devices = stored.placed(params, shardings, jnp.dtype(config.teacher.dtype))
    rows = max(config.train.batch_size // max(config.train.accumulation, 1), mesh.size)
    count, index = jax.process_count(), jax.process_index()
    own = slice(index * rows // count, (index + 1) * rows // count)
    before = None
    for make, missing in zip(masks_of_content(text, config.data, config.mask), todo, strict=True):
        plan = plan_epoch(
            text.train.lengths[missing],
            batch_size=rows,
            buckets=buckets_of(config.data),
            seed=0,
            epoch=0,
            shuffle=False,
        )
        for ids, width in zip(plan.ids, plan.widths, strict=True):
            ids = np.where(ids == EMPTY, EMPTY, missing[ids] if len(missing) else EMPTY)[own]
            batch = make(0, ids, int(width))
            found = answer(on_devices, sharding.put_batch(_with_examples(batch, meta), mesh))
            if before is not None:
                yield before[0], _own_rows(before[1])
            before = batch, found
    if before is not None:
        yield before[0], _own_rows(before[1])


def _with_examples(batch: HostBatch, meta: Meta) -> HostBatch:
    shape = batch["input_ids"].shape
    example, place = np.zeros(shape, np.uint32), np.zeros(shape, np.int32)
    for one in caches.examples_of(batch, meta):
        example[one.row, one.start : one.stop] = np.frombuffer(one.key, "<u4", count=1)[0]
        place[one.row, one.start : one.stop] = np.arange(one.stop - one.start)
    return {name: x for name, x in batch.items() if name != "labels"} | {"example": example, "place": place}


def _own_rows(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """The rows of this host, on the host."""

    def own(x: jax.Array) -> np.ndarray:
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards if shard.replica_id == 0])

    return {name: own(x) for name, x in arrays.items()}


class _Writer:
    """Gathers answers, and writes them as shards; each example once."""

    def __init__(self, out: Path, meta: Meta, known: set[bytes]):
        self.out, self.meta, self.known = out, meta, known
        self._clear()

    def _clear(self) -> None:
        self.examples: list[Example] = []
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in caches.columns_of(self.meta)}
        self.bytes, self.began = 0, time.monotonic()

    def add(self, batch: HostBatch, answers: dict[str, np.ndarray]) -> None:
        columns = caches.columns_of(self.meta)
        gathered = self.meta.tokens == "labels" and not self.meta.causal
        for example in caches.examples_of(batch, self.meta):
            if example.key in self.known:
                continue
            self.known.add(example.key)
            self.examples.append(example)
            kept = np.arange(len(example.kept)) if gathered else example.kept
            for name, column in columns.items():
                of_row = answers[name][example.row]
                values = of_row[example.start : example.stop] if column.every_token else of_row[kept]
                values = caches.stored(name, values, self.meta)
                self.columns[name].append(values)
                self.bytes += values.nbytes
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.began >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        if not self.examples:
            return
        number = len(list(self.out.glob(f"shard-{jax.process_index():03d}-*")))
        caches.write_shard(
            self.out,
            f"shard-{jax.process_index():03d}-{number:05d}",
            keys=[example.key for example in self.examples],
            lengths=[example.stop - example.start for example in self.examples],
            counts=[len(example.kept) for example in self.examples],
            columns={name: np.concatenate(values) for name, values in self.columns.items()},
        )
        self._clear()


class _Progress:
    """Says how far it is, how fast, and how long it will take."""

    def __init__(self, tokens: int, report: Report):
        self.tokens, self.report = tokens, report
        self.done = 0
        self.began = self.said = 0.0  # of the second batch, as the first one compiles
        report(f"answers on {tokens:,} tokens")

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        if not self.began:
            self.began = self.said = now
            self.tokens -= tokens * jax.process_count()
            return
        self.done += tokens * jax.process_count()
        if now - self.said < REPORT_SECONDS and self.done < self.tokens:
            return
        self.said = now
        share, speed = min(self.done / self.tokens, 1.0), self.done / max(now - self.began, 1e-9)
        bar = "#" * int(20 * share)
        left = max(self.tokens - self.done, 0) / speed
        self.report(f"[{bar:<20}] {share:4.0%} of {self.tokens:,} tokens, {speed:,.0f} tokens/s, {left:,.0f} s left")
