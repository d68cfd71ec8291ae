import json
import re

import numpy as np
import pytest
import tiny_causal
from tiny_text import LINES, cut_file, opened, prepared, rows_of, text_source, train_tokenizer

from jaxdistill.data.store import load_token_counts, open_store, split_store
from jaxdistill.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES[:3])


@pytest.fixture
def folder(tmp_path, tokenizer):
    return prepared(text_source(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")


def set_meta(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_STORES = {
    "no meta": (lambda folder: (folder / "meta.json").unlink(), "is not a folder of prepared data"),
    "cut meta": (lambda folder: cut_file(folder / "meta.json", 9), "is not a folder of prepared data"),
    "other version": (lambda folder: set_meta(folder / "meta.json", format_version=0), "of format 0, not 1"),
    "cut tokens": (lambda folder: cut_file(folder / "tokens.bin", 2), "is truncated"),
    "odd tokens": (lambda folder: cut_file(folder / "tokens.bin", 1), "is damaged"),
    "no tokens": (lambda folder: (folder / "tokens.bin").unlink(), "is damaged"),
    "cut offsets": (lambda folder: cut_file(folder / "offsets.npy", 8), "is damaged"),
    "fewer offsets": (lambda folder: np.save(folder / "offsets.npy", np.arange(2)), "is truncated"),
    "no counts": (lambda folder: (folder / "counts.npy").write_bytes(b""), "is damaged"),
}


@pytest.mark.parametrize("case", BAD_STORES)
def test_bad_stores(folder, case):
    spoil, message = BAD_STORES[case]
    assert len(open_store(folder)) == 4
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        open_store(folder)
    assert str(folder) in str(raised.value)


BAD_CAUSAL_STORES = {
    "no documents": lambda folder: (folder / "documents.npy").unlink(),
    "cut documents": lambda folder: cut_file(folder / "documents.npy", 8),
    "fewer documents": lambda folder: np.save(folder / "documents.npy", np.load(folder / "documents.npy")[1:]),
    "another end": lambda folder: np.save(folder / "documents.npy", np.load(folder / "documents.npy") + 1),
    "empty documents": lambda folder: np.save(folder / "documents.npy", np.empty(0, np.int64)),
    "no prompts": lambda folder: (folder / "prompts.npy").unlink(),
    "fewer prompts": lambda folder: np.save(folder / "prompts.npy", np.zeros(1, np.int64)),
}


@pytest.mark.parametrize("case", BAD_CAUSAL_STORES)
def test_bad_causal_stores(tmp_path, case):
    folder = prepared(
        text_source(tmp_path / "a.txt"), tiny_causal.make_tokenizer(LINES), tmp_path / "cache", causal=True
    )
    assert len(open_store(folder)) > 1
    BAD_CAUSAL_STORES[case](folder)
    with pytest.raises(UserError, match=r"is damaged") as raised:
        open_store(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_the_last_rows_are_held_out(folder, fraction, held_out):
    store = open_store(folder)
    train, test = split_store(store, fraction=fraction)
    assert len(test) == held_out
    assert rows_of(train) + rows_of(test) == rows_of(store)
    assert [*train.lengths, *test.lengths] == [*store.lengths]
    np.testing.assert_array_equal(test.token_counts, store.token_counts)


@pytest.mark.parametrize("pack", [False, True])
def test_parts_of_a_causal_store_know_their_documents(tmp_path, pack):
    bpe = tiny_causal.make_tokenizer(LINES)
    store = opened(text_source(tmp_path / "a.txt"), bpe, tmp_path / "cache", pack=pack)
    train, test = split_store(store, fraction=0.3)
    assert rows_of(train) + rows_of(test) == rows_of(store)
    for part in (train, test, store.slice(1, 2)):
        np.testing.assert_array_equal(part.documents, store.documents)
        np.testing.assert_array_equal(part.prompts, store.prompts)


def test_bad_splits(folder):
    store = open_store(folder)
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(UserError, match=re.escape(f"fraction {fraction}")):
            split_store(store, fraction=fraction)
    with pytest.raises(UserError, match="has 1 row"):
        split_store(store.slice(0, 1), fraction=0.5)


def test_token_counts_by_path(tmp_path):
    (tmp_path / "a.json").write_text("[3, 0, 7]")
    np.save(tmp_path / "a.npy", np.array([3, 0, 7], np.int32))
    for name in ("a.json", "a.npy"):
        counts = load_token_counts(tmp_path / name)
        assert counts.tolist() == [3, 0, 7] and counts.dtype == np.int64
    for data in ("[3, -1]", "[[3]]", "[0.5]", '{"a": 3}', '["a"]'):
        (tmp_path / "bad.json").write_text(data)
        with pytest.raises(UserError, match=r"bad.json' must be one flat list"):
            load_token_counts(tmp_path / "bad.json")
    for name, data in (("bad.json", b"[3,"), ("bad.npy", b"pickled"), ("missing.npy", None)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"cannot read token counts '.*{name}'"):
            load_token_counts(tmp_path / name)
