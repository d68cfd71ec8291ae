"""The text of a run: from its settings to prepared rows, and to batches of training and of held-out rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from jaxdistill import processes
from jaxdistill.console import say
from jaxdistill.data.batching import HostBatch, MakeBatch
from jaxdistill.data.causal import next_token_prediction
from jaxdistill.data.fetch import fetched
from jaxdistill.data.masking import content_masking, group_masking, make_mask_draw, row_masking
from jaxdistill.data.pipeline import (
    BatchIterator,
    Hosts,
    Schedule,
    batches_in_order,
    shuffled_batches,
    steps_per_epoch,
)
from jaxdistill.data.prepare import cache_folder, prepare
from jaxdistill.data.readers import Limits
from jaxdistill.data.settings import DataConfig, MaskConfig
from jaxdistill.data.sources import SOURCES, Location, Source, first_documents
from jaxdistill.data.store import TokenStore, content_of, load_token_counts, open_store, split_store
from jaxdistill.data.vocabulary import Vocabulary, vocabulary_of
from jaxdistill.errors import UserError
from jaxdistill.files import named_path

# Of the held-out masks: fixed, and not the run's seed, so that runs of different seeds are measured on the same text.
HELD_OUT_SEED = 0


class Text(NamedTuple):
    """Prepared text and the vocabulary of its tokenizer."""

    train: TokenStore
    held_out: TokenStore
    token_counts: Int64[np.ndarray, "vocab"]  # how often each id stands in the text, for mask.smoothing
    vocabulary: Vocabulary
    path: Path  # folder that `train` is in
    causal: bool


class Sources(NamedTuple):
    """The texts of a run, checked to exist; their documents are not read yet."""

    train: Source | None  # None where a prepared folder replaces it
    held_out: Source | None  # None where a part of the training text is held out


def open_text(data: DataConfig) -> Sources:
    """The texts that the settings name, and the folder for what is prepared of them, before a model is read.

    Raises:
      UserError: as `open_source`; the folder for prepared text cannot be made.
    """
    train = None if data.prepared else open_source(data, path=data.path, split=data.split)
    held_out = None
    if data.eval_path or data.eval_split:
        key = "data.eval_path" if data.eval_path else "data.path"
        held_out = open_source(data, path=data.eval_path or data.path, split=data.eval_split or data.split, key=key)
    if train is not None or held_out is not None:
        cache_folder(data)
    return Sources(train, held_out)


def open_source(data: DataConfig, *, path: str, split: str, key: str = "data.path") -> Source:
    """The source of these settings at another path and split; nothing is read yet but what the fingerprint needs.

    Args:
      key: the setting or flag that names the path, for messages.

    Raises:
      UserError: a missing, empty, truncated or binary file, a missing column, no network.
    """
    if not path:
        raise UserError(f"{key} is empty; data.source={data.source!r} needs a file, glob, folder or name")
    is_of_files = data.source not in ("hf", "tfds")
    source = SOURCES[data.source](
        Location(
            source=data.source,
            path=fetched(path, cache_dir=data.cache_dir, report=say) if is_of_files else path,
            columns=(data.prompt_column, data.column) if data.prompt_column else (data.column,),
            limits=Limits(document=data.max_document_bytes, field_lines=data.max_field_lines),
            subset=data.subset,
            revision=data.revision,
            split=split or "train",
            streaming=data.streaming,
            key=key,
        )
    )
    return first_documents(source, data.limit) if data.limit else source


def prepare_text(
    data: DataConfig, sources: Sources, tokenizer: Any, *, causal: bool, report: Callable[[str], None]
) -> Text:
    """Tokenises what is not yet cached, and opens the result.

    Args:
      sources: of `open_text`.
      tokenizer: a fast tokenizer of transformers.
      report: called with lines for the log.

    Raises:
      UserError: no usable text, or prepared text that does not fit the tokenizer or data.max_length.
    """

    def prepared(source: Source) -> Path:
        return prepare(data, source, tokenizer, causal=causal, report=report)

    # The held-out text comes before the training text: it is small, and may hold nothing of use.
    held_out = None if sources.held_out is None else open_store(prepared(sources.held_out))
    path = named_path(data.prepared) if sources.train is None else prepared(sources.train)
    train = store = open_store(path)
    vocabulary = vocabulary_of(tokenizer, causal=causal)
    _check_store(store, data, vocabulary, causal=causal)
    if held_out is None:
        train, held_out = split_store(store, fraction=data.eval_fraction)
    counts = load_token_counts(data.token_counts) if data.token_counts else store.token_counts
    if len(counts) != vocabulary.size:
        raise UserError(
            f"config.data.token_counts={data.token_counts!r} has {len(counts)} counts, the vocabulary {vocabulary.size}"
        )
    processes.check_same(
        "text",
        {"the digest of the text": content_of(train), "that of the held-out text": content_of(held_out)},
        advice="give all hosts the same text and the same tokenizer",
    )
    return Text(train, held_out, counts, vocabulary, path, causal)


def _check_store(store: TokenStore, data: DataConfig, vocabulary: Vocabulary, *, causal: bool) -> None:
    if store.meta.get("causal", False) != causal:
        kinds = ("a masked", "a causal")
        raise UserError(
            f"{store.path} was prepared for {kinds[not causal]} language model, and this is {kinds[causal]} one"
        )
    if store.meta["max_length"] != data.max_length or store.meta["pack"] != data.packed:
        raise UserError(
            f"{store.path} was prepared with max_length {store.meta['max_length']} and batching "
            f"{'packed' if store.meta['pack'] else 'length'}; the config says {data.max_length} and {data.batching}"
        )
    if len(store.token_counts) != vocabulary.size:
        raise UserError(
            f"{store.path} was prepared with a vocabulary of {len(store.token_counts)}; "
            f"the tokenizer has {vocabulary.size}"
        )


def train_batches(
    text: Text,
    data: DataConfig,
    mask: MaskConfig,
    schedule: Schedule,
    *,
    hosts: Hosts,
    answers: Callable[[HostBatch], HostBatch] | None = None,
) -> BatchIterator:
    """This host's part of the training batches, as a grain iterator with checkpointable state.

    Args:
      answers: puts a teacher's answers from a cache beside a batch.

    Yields:
      input_ids, labels (int32), attention_mask, label_mask (bool), [batch_size / hosts, width]; for packed rows of
      causal models also segment_ids (int32). See `causal.next_tokens` and `masking.mask_groups`.

    Raises:
      UserError: batch, hosts and mask.group do not divide; as `make_mask_draw`; a text without a token to predict.
    """
    if text.causal:
        own_rows = hosts.own_rows(schedule.batch_size, group=1)
        rows = make = next_token_prediction(text.train, pad=text.vocabulary.pad, prompt_loss=data.prompt_loss)
    else:
        draw = make_mask_draw(mask, text.vocabulary, text.token_counts)
        own_rows = hosts.own_rows(schedule.batch_size, group=mask.group)
        if mask.epochs:
            size, limit = schedule.batch_size, schedule.limit_batches
            make = content_masking(
                text.train, draw, epoch_steps=steps_per_epoch(text.train, batch_size=size, limit_batches=limit)
            )
        else:
            make = group_masking(text.train, draw, seed=schedule.seed, first_group=own_rows.start // mask.group)
        rows = row_masking(text.train, draw, seed=HELD_OUT_SEED)
    _check_labels(rows, text.train, data, batch_size=schedule.batch_size, limit=0, name="training text")
    if answers is not None:
        make = _then(make, answers)
    return shuffled_batches(make, text.train, data, schedule, own_rows)


def _then(make: MakeBatch, change: Callable[[HostBatch], HostBatch]) -> MakeBatch:
    return lambda step, ids, width: change(make(step, ids, width))


def masks_of_content(text: Text, data: DataConfig, mask: MaskConfig) -> list[MakeBatch]:
    """Makes all batches in which a row of the training text can come: one function for each epoch with its own masks.

    Raises:
      UserError: masks are new in every epoch.
    """
    if text.causal:
        return [next_token_prediction(text.train, pad=text.vocabulary.pad, prompt_loss=data.prompt_loss)]
    if not mask.epochs:
        raise UserError(
            "config.mask.epochs=0 draws new masks in every epoch, whose answers no cache can hold; set mask.epochs=3, "
            "or another number of epochs with masks of their own, and mask.group=1"
        )
    make = content_masking(text.train, make_mask_draw(mask, text.vocabulary, text.token_counts), epoch_steps=1)
    return [lambda _, ids, width, epoch=epoch: make(epoch, ids, width) for epoch in range(mask.epochs)]


def held_out_batches(
    text: Text, data: DataConfig, mask: MaskConfig, *, batch_size: int, limit: int, hosts: Hosts
) -> Sequence[HostBatch]:
    """This host's part of the held-out batches, in order and always with the same masks.

    Args:
      batch_size: rows of a batch, over all hosts.
      limit: largest number of batches; 0 = all.

    Raises:
      UserError: as `train_batches`.
    """
    if text.causal:
        make = next_token_prediction(text.held_out, pad=text.vocabulary.pad, prompt_loss=data.prompt_loss)
    else:
        draw = make_mask_draw(mask, text.vocabulary, text.token_counts)
        make = row_masking(text.held_out, draw, seed=HELD_OUT_SEED)
    _check_labels(make, text.held_out, data, batch_size=batch_size, limit=limit, name="held-out text")
    own_rows = hosts.own_rows(batch_size, group=1)
    return batches_in_order(make, text.held_out, data, batch_size=batch_size, limit=limit, own_rows=own_rows)


def _check_labels(
    make: MakeBatch, store: TokenStore, data: DataConfig, *, batch_size: int, limit: int, name: str
) -> None:
    """Checks that a token is predicted in the batches of all hosts; mostly one in the first batch shows it.

    A mean over no tokens would be a loss of 0, and a perplexity of 1.
    """
    batches = batches_in_order(make, store, data, batch_size=batch_size, limit=limit, own_rows=slice(0, batch_size))
    if not any(batch["label_mask"].any() for batch in batches):
        raise UserError(
            f"the {name} in {str(store.path)!r} has no token to predict in {len(batches)} batches of {batch_size} "
            "rows: they hold prompts or special tokens alone; give another text, or a larger config.data.max_length"
        )
