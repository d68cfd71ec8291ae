"""Batches for causal models: every next token of the same document is predicted, or the completions' tokens alone."""

import numpy as np
from jaxtyping import Int64, Integer

from jaxdistill.data.batching import HostBatch, MakeBatch, read_rows
from jaxdistill.data.store import TokenStore


def next_token_prediction(store: TokenStore, *, pad: int, prompt_loss: bool) -> MakeBatch:
    """Makes the batches of training and of evaluation, as `next_tokens`."""

    def make(step: int, ids: Int64[np.ndarray, "batch"], width: int) -> HostBatch:
        return next_tokens(store, ids, width=width, pad=pad, prompt_loss=prompt_loss)

    return make


def next_tokens(
    store: TokenStore, ids: Integer[np.ndarray, "batch"], *, width: int, pad: int, prompt_loss: bool
) -> HostBatch:
    """The rows `ids` of a store (EMPTY = no row), and the next token at every position.

    Args:
      prompt_loss: prompts are predicted too.

    Returns:
      input_ids, labels (int32), attention_mask, label_mask (bool), [batch, width]: labels[t] is the token after t, and
      counts where label_mask[t]. For packed rows also segment_ids (int32): 1, 2, ... by document, 0 for padding;
      nothing is predicted across documents.
    """
    assert store.documents is not None and store.prompts is not None, "prepared for masked models"
    batch = read_rows(store, ids, width=width, pad=pad)
    tokens, real = batch["input_ids"], batch["attention_mask"]
    # The place of each token in the whole text. Padding and EMPTY rows have some place too; they are masked out below.
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
    """The index of the document at each place in the text; the last document for places beyond the end."""
    assert store.documents is not None
    found = np.searchsorted(store.documents, places, side="right") - 1
    return np.minimum(found, len(store.documents) - 2)


def pairs_of(store: TokenStore, *, limit: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) as ids, of the documents that have a prompt and stand whole in the store.

    Args:
      limit: largest number of pairs; 0 = all.
    """
    assert store.documents is not None and store.prompts is not None, "prepared for masked models"
    starts, ends = store.documents[:-1], store.documents[1:]
    whole = (starts >= store.offsets[0]) & (ends <= store.offsets[-1])
    pair = (store.prompts > 0) & (store.prompts < ends - starts)  # the last document may be cut inside its prompt
    found = np.flatnonzero(whole & pair)[: limit or None]
    cut = [(int(starts[i]), int(starts[i] + store.prompts[i]), int(ends[i])) for i in found]
    return [(store.tokens[a:b].tolist(), store.tokens[b:c].tolist()) for a, b, c in cut]
