import json
import os
import re
import shutil

import numpy as np
import pytest
import tiny_causal
from tiny_text import LINES, cut_file, opened, prepared, rows_of, text_source, train_tokenizer

from jaxdistill.data.causal import next_token_prediction
from jaxdistill.data.masking import group_masking, make_mask_draw
from jaxdistill.data.pipeline import Schedule, shuffled_batches
from jaxdistill.data.settings import DataConfig, MaskConfig
from jaxdistill.data.store import _scanned, load_token_counts, open_store, records_of, split_store
from jaxdistill.data.vocabulary import vocabulary_of
from jaxdistill.errors import UserError

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES[:3])


@pytest.fixture
def folder(tmp_path, tokenizer):
    return prepared(text_source(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")


def set_meta(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tokens(folder, place, value):
    """Writes one token, and restores the time of the file, as an editor that hides its work."""
    file = folder / "tokens.bin"
    stat = file.stat()
    tokens = np.memmap(file, np.uint16, mode="r+")
    assert tokens[place] != value
    tokens[place] = value
    tokens.flush()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edit_offsets(folder):
    offsets = np.load(folder / "offsets.npy")
    offsets[1] -= 1
    np.save(folder / "offsets.npy", offsets)


def forget_records(folder):
    """As a folder that 0.1.0 prepared."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(
        json.dumps({k: v for k, v in meta.items() if k not in ("fingerprints", "written")})
    )


BAD_STORES = {
    "no meta": (lambda folder: (folder / "meta.json").unlink(), "is not a folder of prepared data"),
    "cut meta": (lambda folder: cut_file(folder / "meta.json", 9), "is not a folder of prepared data"),
    "other version": (lambda folder: set_meta(folder / "meta.json", format_version=0), "of format 0, not 1"),
    "cut tokens": (lambda folder: cut_file(folder / "tokens.bin", 2), "is truncated"),
    "odd tokens": (lambda folder: cut_file(folder / "tokens.bin", 1), "is damaged"),
    "no tokens": (lambda folder: (folder / "tokens.bin").unlink(), "is damaged"),
    "cut offsets": (lambda folder: cut_file(folder / "offsets.npy", 8), "is damaged"),
    "fewer offsets": (lambda folder: np.save(folder / "offsets.npy", np.arange(2)), "is truncated"),
    "offsets that descend": (
        lambda folder: np.save(folder / "offsets.npy", np.load(folder / "offsets.npy")[[0, 2, 1, 3, 4]]),
        r"is damaged \(offsets.npy does not ascend",
    ),
    "other type": (lambda folder: set_meta(folder / "meta.json", dtype="float16"), "is damaged .*dtype 'float16'"),
    **{
        f"{name} is {value!r}": (
            lambda folder, name=name, value=value: set_meta(folder / "meta.json", **{name: value}),
            rf"is damaged \(meta.json: {name}",
        )
        for name, value in (
            *(("tokens", "x"), ("rows", None), ("tokens", -1), ("vocabulary", 3), ("vocabulary", {"size": "x"})),
            *(("max_length", "x"), ("pack", None), ("causal", "x"), ("fingerprints", 3), ("fingerprints", {"a": 3})),
            ("written", {}),
        )
    },
    "a header that is no Python": (
        lambda folder: (folder / "offsets.npy").write_bytes(b"\x93NUMPY\x01\x00\x09\x00{'a': (\0'"),
        "is damaged .offsets.npy",
    ),
    "deep meta": (lambda folder: (folder / "meta.json").write_text("[" * 100_000), "is not a folder of prepared data"),
    **{
        f"{name} holds {array.dtype} {array.shape}": (
            lambda folder, name=name, array=array: np.save(folder / name, array),
            f"is damaged .{name} is no list",
        )
        for name in ("offsets.npy", "counts.npy")
        for array in (np.array(3), np.zeros((3, 3), int), np.zeros(5), np.zeros(5, complex), np.array(["x"]))
    },
    "edited tokens": (lambda folder: edit_tokens(folder, 0, 5), "is damaged: tokens.bin changed after"),
    "edited last token": (lambda folder: edit_tokens(folder, -1, 5), "is damaged: tokens.bin changed after"),
    "edited offsets": (lambda folder: edit_offsets(folder), "is damaged: offsets.npy changed after"),
    "edited counts": (
        lambda folder: np.save(folder / "counts.npy", np.load(folder / "counts.npy")[::-1]),
        "is damaged: counts.npy changed after",
    ),
    "an id beyond the vocabulary, signed anew": (
        lambda folder: (edit_tokens(folder, 3, 60_000), set_meta(folder / "meta.json", **records_of(folder))),
        "is damaged: tokens.bin holds the id 60000, and its vocabulary has",
    ),
    "an id beyond the vocabulary, of 0.1.0": (
        lambda folder: (edit_tokens(folder, 3, 60_000), forget_records(folder)),
        "is damaged: tokens.bin holds the id 60000, and its vocabulary has",
    ),
    "a pointer": (
        lambda folder: (folder / "tokens.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer",
    ),
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


def test_a_folder_of_an_earlier_version_opens(folder):
    rows = rows_of(open_store(folder))
    forget_records(folder)
    assert rows_of(open_store(folder)) == rows


def test_large_files_are_read_only_where_they_may_have_changed(folder, tmp_path, monkeypatch):
    """Counts how often the file of tokens is read whole: not where it was prepared, and once for a copy."""
    monkeypatch.setattr("jaxdistill.data.store.CHECKED_ALWAYS_BYTES", 0)
    _scanned.cache_clear()
    open_store(folder)
    assert _scanned.cache_info().misses == 0
    folder.rename(tmp_path / "moved")
    open_store(tmp_path / "moved")
    assert _scanned.cache_info().misses == 0
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "moved", copy)
    for _ in range(2):
        open_store(copy)
    assert _scanned.cache_info().misses == 1
    edit_tokens(copy, 3, 5)
    edit_tokens(tmp_path / "moved", 3, 5)
    for path in (copy, tmp_path / "moved"):
        with pytest.raises(UserError, match=r"tokens\.bin changed after"):
            open_store(path)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path, tokenizer, causal, threads):
    """To read behind the end of a mapped file would kill the process."""
    bpe = tiny_causal.make_tokenizer(LINES) if causal else tokenizer
    source = text_source(tmp_path / "a.txt", LINES * 500)
    store = open_store(prepared(source, bpe, tmp_path / "cache", causal=causal))
    if causal:
        make = next_token_prediction(store, pad=0, prompt_loss=False)
    else:
        draw = make_mask_draw(MaskConfig(), vocabulary_of(bpe), store.token_counts)
        make = group_masking(store, draw, seed=0, first_group=0)
    data = DataConfig(max_length=16).model_copy(update={"threads": threads, "prefetch": 1})
    schedule = Schedule(batch_size=8, steps=400, limit_batches=0, seed=0)
    batches = shuffled_batches(make, store, data, schedule, slice(0, 8))
    next(batches)
    os.truncate(store.path / "tokens.bin", 0)
    with pytest.raises(UserError, match=r"tokens.bin' was cut from [\d,]+ to 0 bytes while it was read"):
        list(batches)
    with pytest.raises(UserError, match=r"was cut from"):
        store[0]


def test_a_file_that_is_deleted_while_it_is_read_stays_readable(folder):
    store = open_store(folder)
    rows = rows_of(store)
    shutil.rmtree(folder)
    assert rows_of(store) == rows


BAD_CAUSAL_STORES = {
    "no documents": lambda folder: (folder / "documents.npy").unlink(),
    "cut documents": lambda folder: cut_file(folder / "documents.npy", 8),
    "fewer documents": lambda folder: np.save(folder / "documents.npy", np.load(folder / "documents.npy")[1:]),
    "another end": lambda folder: np.save(folder / "documents.npy", np.load(folder / "documents.npy") + 1),
    "edited prompts": lambda folder: np.save(folder / "prompts.npy", np.load(folder / "prompts.npy") + 1),
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
