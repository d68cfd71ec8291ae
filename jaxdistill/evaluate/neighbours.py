"""The nearest words of a word, by the cosine of a model's input embeddings.

This is how the description of a distilled model of tweets shows what it learnt: `lmao` lies beside `Lmaoooo` in the
model of tweets, and beside `lady` in the model that it was made from.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, PyTree

from jaxdistill.data.prompts import whole_texts
from jaxdistill.errors import UserError
from jaxdistill.models.model import Model, embedding_of

Neighbours = list[tuple[str, float]]  # (word, cosine), the nearest first

_STARTS = ("Ġ", "▁")  # how tokenizers of bytes and of SentencePiece mark a token that begins a word
_CONTINUATION = "##"  # how WordPiece marks a token that does not
_HAS_LETTERS = re.compile(r"[^\W\d_]")


def nearest_words(
    model: Model, params: PyTree, tokenizer: Any, words: Sequence[str], *, top: int = 5
) -> list[Neighbours]:
    """For each word the `top` words whose embeddings have the largest cosine with its own.

    A word of several tokens is the mean of their embeddings. Candidates are the tokens that are whole words, or begin
    one, without other spellings of the same token (`lmao` with and without its space).

    Raises:
      UserError: a word is empty, or a token that the tokenizer does not know.
    """
    embedding = np.asarray(embedding_of(model, params), np.float32)
    table = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    candidates = _candidates(tokenizer, size=len(table))
    ids = np.array(list(candidates), np.int64)
    return [_nearest(word, _vector(word, table, embedding, tokenizer), table[ids], candidates, top) for word in words]


def frequent_words(texts: Iterable[str], *, most: int, letters: int) -> list[str]:
    """The words of at least so many letters that stand most often in texts; fewer than `most` where there are fewer."""
    words = (word for text in texts for word in re.findall(r"[^\W\d_]+", text) if len(word) >= letters)
    return [word for word, _ in Counter(words).most_common(most)]


def _nearest(
    word: str,
    vector: Float[np.ndarray, "width"],
    rows: Float[np.ndarray, "candidates width"],
    candidates: dict[int, str],
    top: int,
) -> Neighbours:
    cosines, names = rows @ vector, list(candidates.values())
    found: dict[str, float] = {}
    for i in np.argsort(-cosines, kind="stable"):
        if len(found) == top:
            break
        if names[i] != word.strip():
            found.setdefault(names[i], float(cosines[i]))
    return list(found.items())


def _candidates(tokenizer: Any, *, size: int) -> dict[int, str]:
    """Token id -> the word that it is or begins; of the tokens that have letters."""
    names = {
        id: name for name, id in tokenizer.get_vocab().items() if id < size and id not in tokenizer.all_special_ids
    }
    if any(name.startswith(_STARTS) for name in names.values()):
        names = {id: name for id, name in names.items() if name.startswith(_STARTS)}
    names = {id: name for id, name in sorted(names.items()) if not name.startswith(_CONTINUATION)}
    texts = tokenizer.batch_decode([[id] for id in names], clean_up_tokenization_spaces=False)
    return {
        id: text.strip()
        for id, text in zip(names, texts, strict=True)
        if _HAS_LETTERS.search(text) and not re.fullmatch(r"[\[<].*[\]>]", text.strip())  # as [unused12]
    }


def _vector(
    word: str,
    table: Float[np.ndarray, "vocab width"],
    embedding: Float[np.ndarray, "vocab width"],
    tokenizer: Any,
) -> Float[np.ndarray, "width"]:
    if not word.strip():
        raise UserError("a word is empty; give words with letters, separated by commas")
    # As it stands inside of a text, after a space: tokenizers of bytes have other tokens for the first word.
    rust = whole_texts(tokenizer)
    encodings = rust.encode_batch([f" {word.strip()}", word.strip()], add_special_tokens=False)
    ids = min((encoding.ids for encoding in encodings), key=len)
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(f"the tokenizer does not know the word {word!r}; give another word")
    if len(ids) == 1:
        return table[ids[0]]
    mean = embedding[np.array(ids)].mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)
