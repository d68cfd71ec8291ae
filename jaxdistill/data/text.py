"""The text of a run: from its settings to prepared rows, and to batches of training and of held-out rows."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data import batching, causal, pipeline, sources, tokenize
from jaxdistill.data.settings import DataConfig, MaskConfig
from jaxdistill.errors import UserError

HELD_OUT_SEED = 0  # of the masks: fixed, and not the run's, so that runs of different seeds are measured on one text


class Text(NamedTuple):
    """Prepared text and its tokenizer's vocabulary."""

    train: tokenize.TokenStore
    held_out: tokenize.TokenStore
    token_counts: np.ndarray
    vocabulary: tokenize.Vocabulary
    path: Path  # of the folder that `train` is in
    causal: bool


class Hosts(NamedTuple):
    """Which of several processes reads its rows of every batch."""

    index: int
    count: int


def open_text(data: DataConfig) -> sources.Source | None:
    """The training text, checked to exist; None where a prepared folder replaces it.

    Raises:
      UserError: as sources.open_source.
    """
    return None if data.prepared else _source(data, path=data.path, split=data.split)


def _source(data: DataConfig, *, path: str, split: str) -> sources.Source:
    return sources.open_source(
        source=data.source,
        path=path,
        column=data.column,
        subset=data.subset,
        revision=data.revision,
        split=split,
        streaming=data.streaming,
        limit=data.limit,
        prompt_column=data.prompt_column,
    )


def prepare_text(
    data: DataConfig, source: sources.Source | None, tokenizer: Any, *, causal: bool, tell: Callable[[str], None]
) -> Text:
    """Tokenises what is not yet cached, and opens it.

    Raises:
      UserError: no usable text, or prepared text that does not fit the tokenizer or data.max_length.
    """
    prepare = partial(
        tokenize.prepare,
        tokenizer=tokenizer,
        cache_dir=Path(data.cache_dir).expanduser(),
        max_length=data.max_length,
        min_tokens=data.min_tokens,
        max_unk_fraction=data.max_unk_fraction,
        pack=data.batching == "packed",
        causal=causal,
        template=data.template if causal and data.prompt_column else "",
        tell=tell,
    )
    path = Path(data.prepared) if source is None else prepare(source)
    store = tokenize.open_store(path)
    vocabulary = tokenize.vocabulary_of(tokenizer, causal=causal)
    _check_store(store, data, vocabulary, causal=causal)
    if data.eval_path or data.eval_split:
        held_out_source = _source(data, path=data.eval_path or data.path, split=data.eval_split or data.split)
        train, held_out = store, tokenize.open_store(prepare(held_out_source))
    else:
        train, held_out = tokenize.split_store(store, fraction=data.eval_fraction)
    counts = tokenize.load_token_counts(Path(data.token_counts)) if data.token_counts else store.token_counts
    if len(counts) != vocabulary.size:
        raise UserError(
            f"config.data.token_counts={data.token_counts!r} has {len(counts)} counts, the vocabulary {vocabulary.size}"
        )
    return Text(train, held_out, counts, vocabulary, path, causal)


def _check_store(
    store: tokenize.TokenStore, data: DataConfig, vocabulary: tokenize.Vocabulary, *, causal: bool
) -> None:
    if store.meta.get("causal", False) != causal:
        kinds = ("a masked", "a causal")
        raise UserError(
            f"{store.path} was prepared for {kinds[not causal]} language model, and this is {kinds[causal]} one"
        )
    if store.meta["max_length"] != data.max_length or store.meta["pack"] != (data.batching == "packed"):
        raise UserError(
            f"{store.path} was prepared with max_length {store.meta['max_length']} and batching "
            f"{'packed' if store.meta['pack'] else 'length'}; the config says {data.max_length} and {data.batching}"
        )
    if len(store.token_counts) != vocabulary.size:
        raise UserError(
            f"{store.path} was prepared with a vocabulary of {len(store.token_counts)}; "
            f"the tokenizer has {vocabulary.size}"
        )


def buckets(data: DataConfig) -> tuple[int, ...]:
    """The widths of batches, in tokens."""
    if data.batching == "packed":
        return (data.max_length,)
    return data.buckets or batching.default_buckets(data.max_length)


def train_batches(
    text: Text,
    data: DataConfig,
    mask: MaskConfig,
    *,
    batch_size: int,
    steps: int,
    limit_batches: int,
    seed: int,
    hosts: Hosts,
) -> Any:
    """The training batches of this host as a grain iterator with checkpointable state.

    Args:
      batch_size: rows of a batch, over all hosts.
      steps: number of batches.
      limit_batches: largest number of batches in an epoch; 0 = the whole text.
    """
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "buckets": buckets(data),
        "seed": seed,
        "steps": steps,
        "limit_batches": limit_batches,
        "host": hosts.index,
        "hosts": hosts.count,
        "threads": data.threads,
        "prefetch": data.prefetch,
    }
    if text.causal:
        return causal.train_batches(text.train, pad=text.vocabulary.pad, prompt_loss=data.prompt_loss, **common)
    return pipeline.train_batches(
        text.train, vocabulary=text.vocabulary, mask=mask, token_counts=text.token_counts, **common
    )


def held_out_batches(
    text: Text, data: DataConfig, mask: MaskConfig, *, batch_size: int, limit: int, hosts: Hosts
) -> Sequence[dict[str, np.ndarray]]:
    """The held-out batches of this host, at most `limit` of them (0 = all), always with the same masks."""
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "buckets": buckets(data),
        "limit": limit,
        "host": hosts.index,
        "hosts": hosts.count,
    }
    if text.causal:
        return causal.eval_batches(text.held_out, pad=text.vocabulary.pad, prompt_loss=data.prompt_loss, **common)
    return pipeline.eval_batches(
        text.held_out,
        vocabulary=text.vocabulary,
        mask=mask,
        token_counts=text.token_counts,
        seed=HELD_OUT_SEED,
        **common,
    )
