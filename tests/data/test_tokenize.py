import dataclasses
import json
import re
import resource
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data import tokenize
from jaxdistill.data.sources import open_source
from jaxdistill.data.tokenize import (
    frame,
    load_token_counts,
    open_store,
    prepare,
    split_store,
    vocabulary_of,
)
from jaxdistill.errors import UserError

LINES = [
    "the cat sat on the mat and looked at the dog",
    "the dog sat",
    "a bird flew over the house and the cat looked at the bird and the dog looked at the cat",
    "☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ the cat",
    "house",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES[:3])


def train_tokenizer(lines, **settings):
    import tokenizers
    from transformers import BertTokenizerFast

    wordpiece = tokenizers.BertWordPieceTokenizer(**settings)
    wordpiece.train_from_iterator(lines, vocab_size=90, min_frequency=1, show_progress=False)
    return BertTokenizerFast(tokenizer_object=wordpiece._tokenizer)


def text_source(path, lines=LINES, **settings):
    path.write_text("".join(line + "\n" for line in lines))
    defaults = dict(column="text", subset="", revision="", split="", streaming=False, limit=0)
    return open_source(source="text", path=str(path), **{**defaults, **settings})


def prepared(source, tokenizer, cache, **changes):
    settings = dict(max_length=16, min_tokens=4, max_unk_fraction=0.5, pack=False, tell=lambda line: None)
    return prepare(source, tokenizer, cache_dir=cache, **{**settings, **changes})


def rows_of(store):
    return [store[row].tolist() for row in range(len(store))]


def reference_cut(ids, bos, eos, max_length):
    """`remove_long_sequences` of DistilBERT's dataset, on one framed document."""
    framed = [bos, *ids, eos]
    if len(framed) <= max_length:
        return [framed]
    pieces = [framed[start : start + max_length - 2] for start in range(0, len(framed), max_length - 2)]
    last = len(pieces) - 1
    return [
        ([] if number == 0 else [bos]) + piece + ([] if number == last else [eos])
        for number, piece in enumerate(pieces)
    ]


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    max_length=st.one_of(st.none(), st.integers(4, 20)),
)
def test_frame_cuts_as_the_reference(lengths, max_length):
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []
    rows, row_lengths = frame(tokens, np.array(lengths, np.int64), bos=1, eos=2, max_length=max_length)
    expected = [row for document in documents for row in reference_cut(document.tolist(), 1, 2, max_length or 10**9)]
    assert row_lengths.tolist() == [len(row) for row in expected]
    assert rows.tolist() == [token for row in expected for token in row]
    assert max_length is None or (row_lengths <= max_length).all()


def reference_rows(lines, tokenizer, *, max_length, min_tokens, max_unk_fraction, pack):
    vocabulary = vocabulary_of(tokenizer)
    bare = [tokenizer.encode(line, add_special_tokens=False) for line in lines]
    cut = 10**9 if pack else max_length
    rows = [row for ids in bare for row in reference_cut(ids, vocabulary.bos, vocabulary.eos, cut)]
    rows = [row for row in rows if len(row) >= min_tokens]
    rows = [row for row in rows if row.count(vocabulary.unk) / len(row) < max_unk_fraction]
    if pack:
        flat = [token for row in rows for token in row]
        rows = [flat[end - max_length : end] for end in range(max_length, len(flat) + 1, max_length)]
    return rows


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_prepared_rows_are_those_of_the_reference(tmp_path, tokenizer, monkeypatch, pack, block):
    monkeypatch.setattr(tokenize, "BLOCK_CHARACTERS", block)
    settings = dict(max_length=16, min_tokens=4, max_unk_fraction=0.5, pack=pack)
    store = open_store(prepared(text_source(tmp_path / "a.txt"), tokenizer, tmp_path / "cache", **settings))
    expected = reference_rows(LINES, tokenizer, **settings)
    assert rows_of(store) == expected
    assert store.lengths.tolist() == [len(row) for row in expected]
    counts = np.bincount(np.concatenate(expected), minlength=vocabulary_of(tokenizer).size)
    np.testing.assert_array_equal(store.token_counts, counts)
    np.testing.assert_array_equal(load_token_counts(store.path / "counts.npy"), counts)
    assert store.tokens.dtype == np.uint16
    meta = store.meta
    assert (meta["documents"], meta["rows"], meta["tokens"]) == (5, len(expected), int(store.lengths.sum()))
    assert (meta["dropped_short"], meta["dropped_unk"]) == (1, 1)
    assert {key: meta[key] for key in settings} == settings


@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta-base"])
def test_real_tokenizers_on_real_text(tmp_path, shared, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    text = str(shared / "corpora" / "europarl" / "dev.en.txt.gz")
    source = open_source(
        source="text", path=text, column="", subset="", revision="", split="", streaming=False, limit=150
    )
    settings = dict(max_length=32, min_tokens=12, max_unk_fraction=0.5, pack=False)
    store = open_store(prepared(source, tokenizer, tmp_path, **settings))
    assert rows_of(store) == reference_rows(source.texts(), tokenizer, **settings)
    first = tokenizer.decode(store[0])
    assert first.startswith({"bert-base-uncased": "[CLS]", "roberta-base": "<s>"}[name])


def test_vocabulary_of_real_tokenizers(shared):
    from transformers import AutoTokenizer

    found = {
        name: vocabulary_of(AutoTokenizer.from_pretrained(shared / "tokenizers" / name))
        for name in ("bert-base-uncased", "roberta-base", "gpt2")
    }
    assert found["bert-base-uncased"] == tokenize.Vocabulary(30522, 101, 102, 0, 100, 103, (0, 100, 101, 102, 103))
    assert found["roberta-base"] == tokenize.Vocabulary(50265, 0, 2, 1, 3, 50264, (0, 1, 2, 3, 50264))
    assert dataclasses.replace(found["gpt2"], mask=None, special=()) == tokenize.Vocabulary(
        50257, 50256, 50256, 50256, 50256, None, ()
    )


def test_tokenizers_that_do_not_do():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match="neither cls and sep nor bos and eos"):
        vocabulary_of(bare)
    with pytest.raises(UserError, match="object is not a fast tokenizer"):
        vocabulary_of(object())


@pytest.mark.parametrize(("size", "dtype"), [(65_535, np.uint16), (65_536, np.int32)])
def test_tokens_take_two_bytes_where_they_fit(tmp_path, size, dtype):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0", cls_token="w1", sep_token="w2")
    source = text_source(tmp_path / "a.txt", [f"w3 w4 w{size - 1}"])
    store = open_store(prepared(source, large, tmp_path / "cache"))
    assert rows_of(store) == [[1, 3, 4, size - 1, 2]]
    assert store.tokens.dtype == dtype


def test_reused_until_something_changes(tmp_path, tokenizer):
    told = []
    cache = tmp_path / "cache"
    first = prepared(text_source(tmp_path / "a.txt"), tokenizer, cache, tell=told.append)
    assert told[0].startswith("tokenising text: a.txt")
    told.clear()
    # What transformers leaves behind in its tokenizer is no change.
    tokenizer(LINES, truncation=True, max_length=3, padding=True)
    again = text_source(tmp_path / "moved.txt")
    assert prepared(again, tokenizer, cache, tell=told.append) == first
    assert len(told) == 1 and told[0].startswith("reusing")

    others = [
        prepared(text_source(tmp_path / "a.txt", [*LINES[:-1], "mouse"]), tokenizer, cache),
        prepared(text_source(tmp_path / "a.txt", limit=4), tokenizer, cache),
        # The same vocabulary, another normaliser.
        prepared(text_source(tmp_path / "a.txt"), train_tokenizer(LINES[:3], lowercase=False), cache),
        *(
            prepared(text_source(tmp_path / "a.txt"), tokenizer, cache, **change)
            for change in ({"max_length": 15}, {"min_tokens": 3}, {"max_unk_fraction": 0.9}, {"pack": True})
        ),
    ]
    assert len({first, *others}) == len(others) + 1
    assert all(open_store(folder).path == folder for folder in others)


def at_once(count, work):
    """Results (or exceptions) of `work` in threads that start together."""
    results = [None] * count

    def run(index):
        try:
            results[index] = work()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_two_at_once_do_the_work_once(tmp_path, tokenizer):
    source = text_source(tmp_path / "a.txt")
    reads = []
    counted = dataclasses.replace(source, texts=lambda: (reads.append(1), source.texts())[1])
    folders = at_once(3, lambda: prepared(counted, tokenizer, tmp_path / "cache"))
    assert len(set(folders)) == 1 and len(open_store(folders[0])) == 4
    assert len(reads) == 1


def test_two_at_once_without_file_locks(tmp_path, tokenizer, monkeypatch):
    import filelock

    def no_locks(*_, **__):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    source = text_source(tmp_path / "a.txt")
    together = threading.Barrier(2)
    meeting = dataclasses.replace(source, texts=lambda: (together.wait(30), source.texts())[1])
    cache = tmp_path / "cache"
    folders = at_once(2, lambda: prepared(meeting, tokenizer, cache))
    assert folders[0] == folders[1] and len(open_store(folders[0])) == 4
    assert [path for path in cache.iterdir() if path.is_dir()] == [folders[0]]


def test_what_a_killed_process_left_is_cleared(tmp_path, tokenizer):
    source = text_source(tmp_path / "a.txt")
    cache = tmp_path / "cache"
    folder = prepared(source, tokenizer, cache)
    folder.rename(cache / f"{folder.name}.partial-killed")
    assert prepared(source, tokenizer, cache) == folder
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_a_broken_source_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 1000 + b"\x00")
    source = open_source(
        source="text",
        path=str(tmp_path / "a.txt"),
        column="",
        subset="",
        revision="",
        split="",
        streaming=False,
        limit=0,
    )
    with pytest.raises(UserError, match="binary"):
        prepared(source, tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer):
    """The limit on file size is the nearest to a full disk that a test can have: the write fails half-way."""
    source = text_source(tmp_path / "a.txt", LINES * 500)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write prepared data in '.*cache'.*choose another"):
            prepared(source, tokenizer, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_no_usable_text_says_why(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"no usable text in text: a.txt .*: 2 documents read, 1 .* 1 dropped"):
        prepared(text_source(tmp_path / "a.txt", LINES[3:]), tokenizer, tmp_path / "cache", max_unk_fraction=0.3)
    with pytest.raises(UserError, match=r"5 tokens do not fill one row"):
        prepared(text_source(tmp_path / "a.txt", LINES[1:2]), tokenizer, tmp_path / "cache", pack=True)
    with pytest.raises(UserError, match=r"0 documents read"):
        prepared(text_source(tmp_path / "a.txt", [" "]), tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="max_length=3"):
        prepared(text_source(tmp_path / "a.txt"), tokenizer, tmp_path / "cache", max_length=3)


@pytest.fixture
def folder(tmp_path, tokenizer):
    return prepared(text_source(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")


def cut_file(path, by):
    path.write_bytes(path.read_bytes()[:-by])


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


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_the_last_rows_are_held_out(folder, fraction, held_out):
    store = open_store(folder)
    train, test = split_store(store, fraction=fraction)
    assert len(test) == held_out
    assert rows_of(train) + rows_of(test) == rows_of(store)
    assert [*train.lengths, *test.lengths] == [*store.lengths]
    np.testing.assert_array_equal(test.token_counts, store.token_counts)


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
