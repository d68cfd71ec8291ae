"""Pairs and plain text of causal models, token for token."""

import ast
import copy
from pathlib import Path

import pytest
import tiny_causal
from tiny_text import (
    LINES,
    PAIRS,
    TEMPLATE,
    documents_of,
    framed_tokenizer,
    opened,
    pair_source,
    prefix_ids,
    prepared,
    rows_of,
    text_source,
    train_tokenizer,
    word_tokenizer,
)

import jaxdistill
from jaxdistill.data.prompts import framed_ids, prefix_of, prompt_ids
from jaxdistill.data.store import open_store
from jaxdistill.errors import UserError
from jaxdistill.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module", params=["plain", "framed"])
def causal_tokenizer(request):
    return tiny_causal.make_tokenizer(LINES) if request.param == "plain" else framed_tokenizer()


def test_what_a_tokenizer_puts_before_a_text(causal_tokenizer):
    assert list(prefix_of(causal_tokenizer.backend_tokenizer)) == prefix_ids(causal_tokenizer)
    assert prefix_of(word_tokenizer().backend_tokenizer) == ()


def test_a_prompt_begins_as_its_text_does_in_training_and_has_no_end(causal_tokenizer, tmp_path):
    # Whatever the tokenizer's file says of truncation, of padding and of tokens behind a text (framed_tokenizer: </s>).
    tokenizer = copy.deepcopy(causal_tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    store = opened(text_source(tmp_path / "text"), tokenizer, tmp_path / "cache", max_length=99, min_tokens=1)
    trained = [document[:-1] for document in documents_of(store)[0]]
    assert prompt_ids(tokenizer, LINES) == trained
    assert [prompt_ids(tokenizer, [line])[0] for line in LINES] == trained


def test_a_prompt_of_a_masked_model_has_the_frame_of_training(tmp_path):
    tokenizer = train_tokenizer(LINES[:3])  # adds no [CLS] and [SEP] by itself
    tokenizer.backend_tokenizer.enable_truncation(3)
    folder = prepared(
        text_source(tmp_path / "text", LINES[:3]), tokenizer, tmp_path / "cache", max_length=99, min_tokens=1
    )
    assert framed_ids(tokenizer, LINES[:3]) == rows_of(open_store(folder))


def test_no_other_file_makes_prompts():
    """The tokenizers of transformers are called nowhere: their own calls add and cut what training does not."""
    package = Path(jaxdistill.__file__).parent
    calls = {
        path.name: ast.unparse(node)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("tokenizer", "encode_plus", "apply_chat_template")
    }
    assert calls == {}


def reference_pairs(pairs, tokenizer, template, max_length):
    """(row, tokens that are prompt) of each pair that fits, with `template` taken apart by hand."""
    before, literal, space = template

    def encode(text):
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    rows = []
    for prompt, completion in pairs:
        field, end = encode(before + prompt), [*encode(space + completion), tokenizer.eos_token_id]
        room = max_length - len(prefix_ids(tokenizer) + encode(literal) + end)
        while len(field) > max(room, 0):
            field.pop()
        if len(field) > len(encode(before)):
            start = prefix_ids(tokenizer) + field + encode(literal)
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
        report=told.append,
    )
    expected = reference_pairs(PAIRS, causal_tokenizer, parts, 60)
    assert len(expected) == 4 and max(len(row) for row, _ in expected) == 60, "one is cut, one does not fit"
    documents, prompts = documents_of(store)
    flat = [token for row, _ in expected for token in row]
    if pack:
        assert store.tokens[:].tolist() == flat[: len(store) * 60]
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
    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    source = pair_source(tmp_path / "a.jsonl", [("house", "cat")])
    store = opened(source, gpt2, tmp_path / "cache", max_length=5, template="Say: {prompt} {completion}")
    assert gpt2.convert_ids_to_tokens(store[0]) == ["Say", ":", "Ġhouse", "Ġcat", "<|endoftext|>"]


def test_llama_texts_begin_as_generate_begins(tmp_path, shared):
    from jaxdistill.models.tokenizer import load_tokenizer

    llama = load_tokenizer(shared / "models" / "stories260k-llama")
    store = opened(text_source(tmp_path / "a.txt"), llama, tmp_path, max_length=200)
    assert rows_of(store) == [[*llama(line)["input_ids"], 2] for line in LINES]
    assert all(row[0] == 1 for row in rows_of(store))
