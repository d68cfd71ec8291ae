import dataclasses
import hashlib
import json
import re
import resource
import threading

import numpy as np
import pytest
import tiny_causal
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data import tokenize
from jaxdistill.data.sources import open_source
from jaxdistill.data.tokenize import (
    frame,
    frame_causal,
    load_token_counts,
    open_store,
    own_prefix,
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


# Causal models

TEMPLATE = "Say it: {prompt}\nTL;DR: {completion}"
PAIRS = [
    ("the cat sat on the mat and looked at the dog", "the cat sat"),
    ("a bird {prompt} flew over the house", "bird {completion} {0}"),
    ("the dog sat " * 30 + "down", "the dog"),
    ("house", "the cat and the dog and the bird and the house and" + " the mat" * 40),
    ("the end of the cat", "a"),
]


def framed_tokenizer(lines=LINES):
    """As Llama's: <s> before a text. Behind it </s>, which is no prefix."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=280, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def word_tokenizer(**special):
    """The words of LINES, <unk> for others."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *sorted({word for line in LINES for word in line.split() if word.isascii()})]
    model = tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, "<unk>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


@pytest.fixture(scope="module", params=["plain", "framed"])
def causal_tokenizer(request):
    return tiny_causal.make_tokenizer(LINES) if request.param == "plain" else framed_tokenizer()


def prefix_of(tokenizer):
    return [1] if tokenizer.bos_token == "<s>" else []


def pair_source(path, pairs=PAIRS):
    settings = dict(subset="", revision="", split="", streaming=False, limit=0)
    path.write_text("".join(json.dumps({"q": prompt, "a": answer}) + "\n" for prompt, answer in pairs))
    return open_source(source="jsonl", path=str(path), column="a", prompt_column="q", **settings)


def opened(source, tokenizer, cache, **changes):
    return open_store(prepared(source, tokenizer, cache, causal=True, **changes))


def documents_of(store):
    """Token lists of the documents, and how many of each are prompt."""
    return [part.tolist() for part in np.split(store.tokens, store.documents[1:-1])], store.prompts.tolist()


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    prefix=st.lists(st.integers(1, 3), max_size=2),
    max_length=st.one_of(st.none(), st.integers(4, 20)),
)
def test_causal_frame_cuts_in_consecutive_pieces(lengths, prefix, max_length):
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []
    settings = dict(prefix=prefix, eos=2, max_length=max_length)
    rows, row_lengths = frame_causal(tokens, np.array(lengths, np.int64), **settings)
    framed = [[*prefix, *document.tolist(), 2] for document in documents]
    step = max_length or 10**9
    expected = [row[start : start + step] for row in framed for start in range(0, len(row), step)]
    assert row_lengths.tolist() == [len(row) for row in expected]
    assert rows.tolist() == [token for row in expected for token in row]


def test_what_a_tokenizer_puts_before_a_text(causal_tokenizer, tokenizer):
    assert list(own_prefix(causal_tokenizer.backend_tokenizer)) == prefix_of(causal_tokenizer)
    assert own_prefix(tokenizer.backend_tokenizer) == ()
    assert own_prefix(word_tokenizer().backend_tokenizer) == ()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("block", [1, 10**6])
def test_causal_rows_of_plain_text(tmp_path, causal_tokenizer, monkeypatch, pack, block):
    monkeypatch.setattr(tokenize, "BLOCK_CHARACTERS", block)
    settings = dict(max_length=16, min_tokens=8, pack=pack)  # more than "house" has, however it is cut
    store = opened(text_source(tmp_path / "a.txt"), causal_tokenizer, tmp_path / "cache", **settings)
    encode, end = causal_tokenizer.backend_tokenizer.encode, causal_tokenizer.eos_token_id
    whole = [[*prefix_of(causal_tokenizer), *encode(line, add_special_tokens=False).ids, end] for line in LINES]
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
    np.testing.assert_array_equal(np.bincount(store.tokens, minlength=len(store.token_counts)), store.token_counts)


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
    for other in (word_tokenizer(), tokenizer):  # the second has cls and sep
        with pytest.raises(UserError, match="has no eos token"):
            opened(text_source(tmp_path / "a.txt"), other, tmp_path / "cache")


def reference_pairs(pairs, tokenizer, template, max_length):
    """(row, tokens that are prompt) of each pair that fits, with `template` taken apart by hand."""
    before, literal, space = template

    def encode(text):
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    rows = []
    for prompt, completion in pairs:
        field, end = encode(before + prompt), [*encode(space + completion), tokenizer.eos_token_id]
        room = max_length - len(prefix_of(tokenizer) + encode(literal) + end)
        while len(field) > max(room, 0):
            field.pop()
        if len(field) > len(encode(before)):
            start = prefix_of(tokenizer) + field + encode(literal)
            rows.append((start + end, len(start)))
    return rows


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (TEMPLATE, ("Say it: ", "\nTL;DR:", " ")),
        ("{prompt}{completion}", ("", "", "")),
        ("{prompt} \n{completion}", ("", "", " \n")),
        ("{0} {prompt} {} => {completion}", ("{0} ", " {} =>", " ")),
    ],
)
def test_pairs_in_their_template(tmp_path, causal_tokenizer, template, parts, pack):
    told = []
    store = opened(
        pair_source(tmp_path / "a.jsonl"),
        causal_tokenizer,
        tmp_path / "cache",
        max_length=60,
        template=template,
        pack=pack,
        tell=told.append,
    )
    expected = reference_pairs(PAIRS, causal_tokenizer, parts, 60)
    assert len(expected) == 4 and max(len(row) for row, _ in expected) == 60, "one is cut, one does not fit"
    documents, prompts = documents_of(store)
    flat = [token for row, _ in expected for token in row]
    if pack:
        assert store.tokens.tolist() == flat[: len(store) * 60]
        sizes = [size for _, size in expected][: len(prompts)]
        assert prompts == [*sizes[:-1], min(sizes[-1], len(documents[-1]))]
    else:
        assert rows_of(store) == documents == [row for row, _ in expected]
        assert prompts == [size for _, size in expected]
    assert (store.meta["dropped_long"], store.meta["template"], store.meta["documents"]) == (1, template, 5)
    assert "1 too long" in told[-1]


@pytest.mark.parametrize("before", ["", "the cat "])
def test_a_pair_keeps_one_token_of_its_prompt_or_goes(tmp_path, before):
    words = word_tokenizer(eos_token="<end>")
    start = before.split()

    def rows(max_length, prompt="dog bird house"):
        source = pair_source(tmp_path / "a.jsonl", [(prompt, "and the house"), ("a", "a")])
        template = before + "{prompt} on the {completion}"
        store = opened(source, words, tmp_path / "cache", max_length=max_length, min_tokens=1, template=template)
        return [words.convert_ids_to_tokens(row) for row in rows_of(store)], store.prompts.tolist()

    small = ([*start, "a", "on", "the", "a", "<end>"], len(start) + 3)
    for kept in (3, 2, 1):
        row = [*start, *["dog", "bird", "house"][:kept], "on", "the", "and", "the", "house", "<end>"]
        assert rows(len(row)) == ([row, small[0]], [len(row) - 4, small[1]])
    assert rows(len(start) + 6) == ([small[0]], [small[1]])
    whole = [*start, "dog", "on", "the", "and", "the", "house", "<end>"]
    assert rows(len(whole), prompt="dog")[0] == [whole, small[0]]


@pytest.mark.parametrize("pack", [False, True])
def test_pairs_that_are_dropped_take_their_prompts_along(tmp_path, pack):
    words = word_tokenizer(eos_token="<end>")
    pairs = [("the cat sat on", "the mat"), ("a", "a"), ("? ? ? ?", "?"), ("the dog", "sat on the mat")]
    settings = dict(max_length=7, min_tokens=4, pack=pack, template="{prompt} {completion}")
    store = opened(pair_source(tmp_path / "a.jsonl", pairs), words, tmp_path / "cache", **settings)
    assert (store.documents.tolist(), store.prompts.tolist()) == ([0, 7, 14], [4, 2])
    assert (store.meta["dropped_short"], store.meta["dropped_unk"], store.meta["dropped_long"]) == (1, 1, 0)


def test_no_pair_fits(tmp_path):
    words = word_tokenizer(eos_token="<end>")
    source = pair_source(tmp_path / "a.jsonl", [("a", "the cat sat on the mat")] * 3)
    with pytest.raises(UserError, match=r"3 documents read.*, 3 dropped for no room for a prompt in 6 tokens"):
        opened(source, words, tmp_path / "cache", max_length=6, template="{prompt} {completion}")


def test_the_prompt_of_a_document_that_is_cut_ends_with_it(tmp_path):
    words = word_tokenizer(eos_token="<end>")
    source = pair_source(tmp_path / "a.jsonl", [("the cat sat", "the dog")] * 2)  # 6 tokens each, 3 of them prompt
    settings = dict(max_length=8, pack=True, template="{prompt} {completion}")
    store = opened(source, words, tmp_path / "cache", **settings)
    assert (store.documents.tolist(), store.prompts.tolist()) == ([0, 6, 8], [3, 2])


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "{completion}",
        "{completion} {prompt}",
        "{prompt} {completion}.",
        "{prompt} {prompt} {completion}",
        "{prompt} {completion} {completion}",
        "{prompt} { completion }",
        " ",
    ],
)
def test_bad_templates(tmp_path, template):
    with pytest.raises(UserError, match=re.escape(f"data.template={template!r} must hold {{prompt}} once")):
        opened(pair_source(tmp_path / "a.jsonl"), tiny_causal.make_tokenizer(LINES), tmp_path, template=template)


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
    assert set(meta) == {*names, "format_version", *counts, "dropped_rest_tokens"}
    assert {path.name for path in masked.iterdir()} == {"tokens.bin", "offsets.npy", "counts.npy", "meta.json"}
    assert open_store(masked).documents is open_store(masked).prompts is None


@pytest.mark.parametrize("pack", [False, True])
def test_parts_of_a_causal_store_know_their_documents(tmp_path, pack):
    bpe = tiny_causal.make_tokenizer(LINES)
    store = opened(text_source(tmp_path / "a.txt"), bpe, tmp_path / "cache", pack=pack)
    train, test = split_store(store, fraction=0.3)
    assert rows_of(train) + rows_of(test) == rows_of(store)
    for part in (train, test, store.slice(1, 2)):
        np.testing.assert_array_equal(part.documents, store.documents)
        np.testing.assert_array_equal(part.prompts, store.prompts)


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


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/stories260k-llama"])
def test_pairs_are_what_generate_is_given(tmp_path, shared, name):
    from jaxdistill.models.tokenizer import load_tokenizer

    real = load_tokenizer(shared / name)
    store = opened(
        pair_source(tmp_path / "a.jsonl"), real, tmp_path, max_length=256, template="{prompt}\nTL;DR: {completion}"
    )
    assert store.meta["dropped_long"] == 0
    for row, size, (prompt, completion) in zip(rows_of(store), store.prompts, PAIRS, strict=True):
        assert row[:size] == real(f"{prompt}\nTL;DR:")["input_ids"]
        assert row == [*real(f"{prompt}\nTL;DR: {completion}")["input_ids"], real.eos_token_id]


def test_a_prompt_that_takes_up_the_space_before_it_needs_no_more_room(tmp_path, shared):
    """ "Say: " alone is three tokens, and "Say: house" too."""
    from transformers import AutoTokenizer

    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    source = pair_source(tmp_path / "a.jsonl", [("house", "cat")])
    store = opened(source, gpt2, tmp_path / "cache", max_length=5, template="Say: {prompt} {completion}")
    assert gpt2.convert_ids_to_tokens(store[0]) == ["Say", ":", "Ġhouse", "Ġcat", "<|endoftext|>"]


def test_llama_texts_begin_as_generate_begins(tmp_path, shared):
    from jaxdistill.models.tokenizer import load_tokenizer

    llama = load_tokenizer(shared / "models" / "stories260k-llama")
    store = opened(text_source(tmp_path / "a.txt"), llama, tmp_path, max_length=200)
    assert rows_of(store) == [[*llama(line)["input_ids"], 2] for line in LINES]
    assert all(row[0] == 1 for row in rows_of(store))


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
