import dataclasses
import hashlib
import json
import resource
import threading

import numpy as np
import pytest
import tiny_causal
from tiny_text import (
    LINES,
    TEMPLATE,
    documents_of,
    framed_tokenizer,
    opened,
    pair_source,
    prefix_ids,
    prepared,
    reference_cut,
    rows_of,
    text_source,
    train_tokenizer,
    word_tokenizer,
)

from jaxdistill.data.settings import DataConfig
from jaxdistill.data.store import load_token_counts, open_store
from jaxdistill.data.text import open_source, open_text, prepare_text
from jaxdistill.data.vocabulary import vocabulary_of
from jaxdistill.errors import UserError
from jaxdistill.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES[:3])


@pytest.fixture(scope="module", params=["plain", "framed"])
def causal_tokenizer(request):
    return tiny_causal.make_tokenizer(LINES) if request.param == "plain" else framed_tokenizer()


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
    monkeypatch.setattr("jaxdistill.data.encode.BLOCK_CHARACTERS", block)
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
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    text = str(shared / "corpora" / "europarl" / "dev.en.txt.gz")
    source = open_source(DataConfig(source="text", limit=150), path=text, split="")
    settings = dict(max_length=32, min_tokens=12, max_unk_fraction=0.5, pack=False)
    store = open_store(prepared(source, tokenizer, tmp_path, **settings))
    assert rows_of(store) == reference_rows(source.documents(), tokenizer, **settings)
    first = tokenizer.decode(store[0])
    assert first.startswith({"bert-base-uncased": "[CLS]", "roberta-base": "<s>"}[name])


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


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("block", [1, 10**6])
def test_causal_rows_of_plain_text(tmp_path, causal_tokenizer, monkeypatch, pack, block):
    monkeypatch.setattr("jaxdistill.data.encode.BLOCK_CHARACTERS", block)
    settings = dict(max_length=16, min_tokens=8, pack=pack)  # more than "house" has, however it is cut
    store = opened(text_source(tmp_path / "a.txt"), causal_tokenizer, tmp_path / "cache", **settings)
    encode, end = causal_tokenizer.backend_tokenizer.encode, causal_tokenizer.eos_token_id
    whole = [[*prefix_ids(causal_tokenizer), *encode(line, add_special_tokens=False).ids, end] for line in LINES]
    cut = [row[start : start + 16] for row in whole for start in range(0, len(row), 16)]
    documents = [row for row in (whole if pack else cut) if len(row) >= 8]
    assert 0 < store.meta["dropped_short"] == len(whole if pack else cut) - len(documents)
    flat = [token for row in documents for token in row]
    rows = [flat[end - 16 : end] for end in range(16, len(flat) + 1, 16)] if pack else documents
    if pack:
        assert store.meta["dropped_rest_tokens"] == len(flat) % 16
        left = len(flat) // 16 * 16
        before = np.cumsum([0, *map(len, documents)])
        documents = [row[: left - start] for row, start in zip(documents, before, strict=False) if start < left]
    assert any(len(row) > 16 for row in whole), "something to cut"
    assert rows_of(store) == rows
    assert documents_of(store) == (documents, [0] * len(documents))
    assert store.documents.dtype == store.prompts.dtype == np.int64
    assert (store.meta["causal"], store.meta["template"], store.meta["tokens"]) == (True, "", sum(map(len, rows)))
    np.testing.assert_array_equal(np.bincount(store.tokens[:], minlength=len(store.token_counts)), store.token_counts)


def test_packed_documents_that_the_last_row_does_not_reach(tmp_path):
    """Of 7, 7, 7 tokens in rows of 8 the second row ends inside the third; of 8, 5 there is no second document."""
    words = word_tokenizer(eos_token="<end>")
    six, seven, four = "the cat sat on the mat", "the cat sat on the mat and", "the dog sat on"
    three = opened(text_source(tmp_path / "a.txt", [six] * 3), words, tmp_path / "cache", max_length=8, pack=True)
    assert (three.documents.tolist(), three.prompts.tolist(), len(three)) == ([0, 7, 14, 16], [0, 0, 0], 2)
    one = opened(text_source(tmp_path / "b.txt", [seven, four]), words, tmp_path / "cache", max_length=8, pack=True)
    assert (one.documents.tolist(), one.prompts.tolist(), len(one)) == ([0, 8], [0], 1)


def test_unknown_tokens_of_causal_documents(tmp_path):
    words = word_tokenizer(eos_token="<end>")
    for pack in (False, True):  # 8 of 11 tokens of the fourth line are unknown
        source = text_source(tmp_path / "a.txt", [LINES[0], LINES[3]])
        store = opened(source, words, tmp_path / "cache", max_length=12, pack=pack)
        assert (store.meta["rows"], store.meta["dropped_unk"]) == (1, 1)


def test_an_end_token_is_not_unknown(tmp_path):
    """GPT-2 has one token for both."""
    bpe = tiny_causal.make_tokenizer(LINES)
    assert bpe.unk_token_id == bpe.eos_token_id
    store = opened(text_source(tmp_path / "a.txt"), bpe, tmp_path / "cache", max_unk_fraction=0.01, min_tokens=1)
    assert (store.meta["documents"], store.meta["dropped_short"], store.meta["dropped_unk"]) == (5, 0, 0)


def test_causal_models_need_an_end_token_alone(tmp_path, tokenizer):
    words = word_tokenizer(eos_token="<end>")
    with pytest.raises(UserError, match="neither cls and sep nor bos and eos"):
        vocabulary_of(words)
    assert vocabulary_of(words, causal=True).eos == vocabulary_of(words, causal=True).pad + 1 == 1
    store = opened(text_source(tmp_path / "a.txt", LINES[1:2]), words, tmp_path / "cache")
    assert rows_of(store) == [[*words.encode(LINES[1]), 1]]
    with pytest.raises(UserError, match="has no eos token to end a text, and no sep token"):
        opened(text_source(tmp_path / "a.txt"), word_tokenizer(), tmp_path / "cache")
    assert tokenizer.eos_token_id is None
    assert vocabulary_of(tokenizer, causal=True).eos == tokenizer.sep_token_id


def test_causal_folders_have_names_of_their_own_and_masked_ones_their_old_names(tmp_path, tokenizer):
    bpe, cache = tiny_causal.make_tokenizer(LINES), tmp_path / "cache"
    pairs, text = pair_source(tmp_path / "a.jsonl"), text_source(tmp_path / "a.txt")
    folders = [
        prepared(text, bpe, cache),
        prepared(text, bpe, cache, causal=True),
        prepared(pairs, bpe, cache, causal=True, max_length=60, template=TEMPLATE),
        prepared(pairs, bpe, cache, causal=True, max_length=60, template="{prompt} {completion}"),
    ]
    assert len(set(folders)) == 4
    assert prepared(text, bpe, cache, causal=True) == folders[1]

    masked = prepared(text, tokenizer, cache)
    meta = open_store(masked).meta
    names = ("max_length", "min_tokens", "max_unk_fraction", "pack", "source", "tokenizer", "vocabulary")
    settings = json.dumps({name: meta[name] for name in (*names, "format_version")}, sort_keys=True)
    assert masked.name == hashlib.sha256(settings.encode()).hexdigest()[:32]
    counts = ("describe", "dtype", "documents", "rows", "tokens", "dropped_short", "dropped_unk")
    assert set(meta) == {*names, "format_version", *counts, "dropped_rest_tokens", "fingerprints", "written"}
    assert {path.name for path in masked.iterdir()} == {"tokens.bin", "offsets.npy", "counts.npy", "meta.json"}
    assert open_store(masked).documents is open_store(masked).prompts is None


def test_reused_until_something_changes(tmp_path, tokenizer):
    told = []
    cache = tmp_path / "cache"
    first = prepared(text_source(tmp_path / "a.txt"), tokenizer, cache, report=told.append)
    assert told[0].startswith("tokenising text: a.txt")
    told.clear()
    # What transformers leaves behind in its tokenizer is no change.
    tokenizer(LINES, truncation=True, max_length=3, padding=True)
    again = text_source(tmp_path / "moved.txt")
    assert prepared(again, tokenizer, cache, report=told.append) == first
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
    counted = dataclasses.replace(source, documents=lambda: (reads.append(1), source.documents())[1])
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
    meeting = dataclasses.replace(source, documents=lambda: (together.wait(30), source.documents())[1])
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
    source = open_source(DataConfig(source="text"), path=str(tmp_path / "a.txt"), split="")
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


@pytest.mark.parametrize("held_out", ["missing.txt", "blank.txt"])
def test_held_out_text_is_read_before_the_training_text(tmp_path, tokenizer, held_out):
    """A name that is wrong is said before hours of tokenising."""
    text_source(tmp_path / "a.txt")
    (tmp_path / "blank.txt").write_text(" \n\n")
    data = DataConfig(
        path=str(tmp_path / "a.txt"),
        eval_path=str(tmp_path / held_out),
        cache_dir=str(tmp_path / "cache"),
        max_length=16,
    )
    with pytest.raises(UserError, match=rf"no such file: '.*{held_out}'|no usable text in text: {held_out}"):
        prepare_text(data, open_text(data), tokenizer, causal=False, report=lambda line: None)
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir()]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "none.txt"}, r"^data\.path: no such file: '.*none\.txt'"),
        ({"eval_path": "none.txt"}, r"^data\.eval_path: no such file: '.*none\.txt'"),
        ({"prepared": "x", "eval_path": "none.txt"}, r"^data\.eval_path: no such file: '.*none\.txt'"),
        ({"eval_path": ",,"}, r"^data\.eval_path=',,' names no file"),
        ({"cache_dir": "~nosuchuser/x"}, r"^config\.data\.cache_dir='~nosuchuser/x' is not a path of this machine"),
        ({"cache_dir": "a.txt/x"}, r"^cannot write prepared data in '.*a\.txt/x': Not a directory; make room"),
    ],
)
def test_what_texts_need_is_checked_before_any_model_is_read(tmp_path, monkeypatch, settings, said):
    monkeypatch.chdir(tmp_path)
    text_source(tmp_path / "a.txt")
    with pytest.raises(UserError, match=said):
        open_text(DataConfig(**{"path": "a.txt", "cache_dir": "cache", **settings}))
