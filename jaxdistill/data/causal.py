"""Batches for causal models: every next token of its own document is predicted, or those of completions alone."""

from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from jaxdistill.data.masking import Batch
from jaxdistill.data.pipeline import Batches, in_order, planned, read, rows_of_host
from jaxdistill.data.tokenize import TokenStore


def train_batches(
    store: TokenStore,
    *,
    pad: int,
    batch_size: int,
    buckets: tuple[int, ...],
    prompt_loss: bool,
    seed: int,
    steps: int,
    host: int,
    hosts: int,
    threads: int,
    prefetch: int,
    limit_batches: int = 0,
) -> Any:
    """A grain iterator over this host's part of `steps` training batches, as pipeline.train_batches.

    Args:
      prompt_loss: prompts are predicted too.

    Yields:
      input_ids, labels (int32), attention_mask, label_mask (bool), [batch_size / hosts, width]: labels[t] is the token
      after t, and counts where label_mask[t]. Of packed rows also segment_ids (int32): 1, 2, ... by document, 0 for
      padding; nothing is predicted across documents.

    Raises:
      UserError: batch and hosts do not divide.
    """
    rows = rows_of_host(batch_size, hosts, 1)
    return planned(
        lambda step, ids, width: next_tokens(store, ids, width=width, pad=pad, prompt_loss=prompt_loss),
        store,
        batch_size=batch_size,
        buckets=buckets,
        seed=seed,
        steps=steps,
        hosts=slice(host * rows, (host + 1) * rows),
        threads=threads,
        prefetch=prefetch,
        limit_batches=limit_batches,
    )


def eval_batches(
    store: TokenStore,
    *,
    pad: int,
    batch_size: int,
    buckets: tuple[int, ...],
    prompt_loss: bool,
    limit: int,
    host: int,
    hosts: int,
) -> Batches:
    """This host's part of each held-out batch, as those of `train_batches`, in order; at most `limit`, 0 = all."""
    rows = rows_of_host(batch_size, hosts, 1)
    return in_order(
        lambda ids, width: next_tokens(store, ids, width=width, pad=pad, prompt_loss=prompt_loss),
        store,
        batch_size=batch_size,
        buckets=buckets,
        hosts=slice(host * rows, (host + 1) * rows),
        limit=limit,
    )


def next_tokens(
    store: TokenStore, ids: Integer[np.ndarray, "batch"], *, width: int, pad: int, prompt_loss: bool
) -> Batch:
    """The rows `ids` of a store (EMPTY = none) as a batch; see `train_batches`."""
    assert store.documents is not None and store.prompts is not None, "prepared for masked LMs"
    batch = read(store, ids, width=width, pad=pad)
    tokens, real = batch["input_ids"], batch["attention_mask"]
    # Where each token stands in the whole text; padding, and what stands in for an EMPTY row, is masked out below.
    places = store.offsets[np.maximum(ids, 0)][:, None] + np.arange(width)
    document = _document(store, places)
    predicted = real[:, 1:] & (document[:, 1:] == document[:, :-1])
    if not prompt_loss:
        predicted &= (places >= store.documents[document] + store.prompts[document])[:, 1:]
    last = ((0, 0), (0, 1))
    batch["labels"] = np.pad(tokens[:, 1:], last, constant_values=pad)
    batch["label_mask"] = np.pad(predicted, last)
    if store.meta["pack"]:
        batch["segment_ids"] = np.where(real, document - document[:, :1] + 1, 0).astype(np.int32)
    return batch


def _document(store: TokenStore, places: Int64[np.ndarray, "*tokens"]) -> Int64[np.ndarray, "*tokens"]:
    assert store.documents is not None
    found = np.searchsorted(store.documents, places, side="right") - 1
    return np.minimum(found, len(store.documents) - 2)


def pairs_of(store: TokenStore, *, limit: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) as ids, of the documents that have a prompt and stand whole in the store; 0 = all."""
    assert store.documents is not None and store.prompts is not None, "prepared for masked LMs"
    starts, ends = store.documents[:-1], store.documents[1:]
    whole = (starts >= store.offsets[0]) & (ends <= store.offsets[-1])
    pair = (store.prompts > 0) & (store.prompts < ends - starts)  # the last one may be cut inside its prompt
    found = np.flatnonzero(whole & pair)[: limit or None]
    cut = [(int(starts[i]), int(starts[i] + store.prompts[i]), int(ends[i])) for i in found]
    return [(store.tokens[a:b].tolist(), store.tokens[b:c].tolist()) for a, b, c in cut]
