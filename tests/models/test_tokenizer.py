"""Tokenizers of folders: what is read, and one clear line for what cannot be or does not fit."""

import functools
import io
import json
import sys

import pytest
import tiny
import transformers
from refusal import refused

from jaxdistill.data.vocabulary import vocabulary_of
from jaxdistill.errors import UserError
from jaxdistill.models.tokenizer import (
    check_same_vocabulary,
    check_tokenizer,
    end_ids,
    end_texts_alike,
    load_tokenizer,
)

pytestmark = pytest.mark.newest


def tokenizer_file(folder, *special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate([*special, "the", "session"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special[0] if special else "the"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_bare_tokenizer_json(tmp_path):
    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast and (tokenizer.mask_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        4,
        1,
        7,
    )
    check_tokenizer(tokenizer, tiny.config("bert", vocab_size=7))
    refused(
        lambda: check_tokenizer(tokenizer, tiny.config("bert", vocab_size=6)),
        "largest id is 6",
        "has 6 entries",
    )


def test_no_tokenizer(tmp_path):
    refused(lambda: load_tokenizer(tmp_path), "has no tokenizer")
    tokenizer_file(tmp_path)
    refused(lambda: load_tokenizer(tmp_path), "none of the tokens")
    whole = (tmp_path / "tokenizer.json").read_text()
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
        refused(lambda: load_tokenizer(tmp_path), "no tokenizer that can be read")
        (tmp_path / name).write_text(json.dumps({"model_type": "bert", "tokenizer_class": "BertTokenizer"}))
    (tmp_path / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(tmp_path), "no tokenizer that can be read")


# Byte-pair encodings as transformers 5 writes them for LlamaTokenizer and for GPT2Tokenizer.
LETTERS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "Ġ", "Ġa"]


def file_of_5(folder, *, kind="Llama", template="$A", prefix_space=False, **fields):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    words = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("a", "b"), ("Ġ", "a")], fuse_unk=True, unk_token="<unk>"))
    llama = kind == "Llama"
    words.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        if llama
        else pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    )
    words.decoder = decoders.Metaspace() if llama else decoders.ByteLevel()
    frame = [(token, vocabulary[token]) for token in ("<s>", "</s>") if token in template]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=frame)
    words.add_special_tokens([AddedToken(token, normalized=False) for token in LETTERS[:3]])
    extra = fields.get("extra_special_tokens", [])
    words.add_special_tokens([*extra, *(token for name, token in fields.items() if name == "image_token")])
    words.save(str(folder / "tokenizer.json"))
    settings = {"backend": "tokenizers", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{kind}Tokenizer", **settings}))


@pytest.mark.parametrize(
    ("given", "ids", "special"),
    [
        ({}, [6, 5, 3, 1, 4], {0, 1, 2}),  # no <s>, which LlamaTokenizerFast of transformers 4.57 would add
        ({"template": "$A </s>"}, [6, 5, 3, 1, 4, 2], {0, 1, 2}),
        ({"template": "<s> $A", "add_bos_token": False}, [1, 6, 5, 3, 1, 4], {0, 1, 2}),
        ({"add_bos_token": True, "add_eos_token": True}, [6, 5, 3, 1, 4], {0, 1, 2}),  # 5 goes by the file
        ({"add_prefix_space": True}, [6, 5, 3, 1, 4], {0, 1, 2}),  # 4.57 would look for a sentencepiece file
        ({"extra_special_tokens": ["<e1>", "<e2>"]}, [6, 5, 3, 1, 4], {0, 1, 2, 10, 11}),
        ({"kind": "Nobodys", "extra_special_tokens": ["<e1>"]}, [7, 8, 1, 4], {0, 1, 2, 10}),  # in GPT-2's manner
        ({"kind": "GPT2", "template": "<s> $A"}, [1, 7, 8, 1, 4], {0, 1, 2}),
        ({"tokenizer_class": "TokenizersBackend", "kind": "GPT2", "prefix_space": True}, [8, 7, 8, 1, 9], {0, 1, 2}),
        ({"tokenizer_class": "TokenizersBackend", "image_token": "<i>"}, [6, 5, 3, 1, 4], {0, 1, 2, 10}),
    ],
)
def test_files_of_transformers_5_give_its_ids(tmp_path, given, ids, special):
    file_of_5(tmp_path, **given)
    tokenizer = load_tokenizer(tmp_path)
    for saved in ("", "again", "and again"):
        assert tokenizer("ab <s>a")["input_ids"] == ids and {*tokenizer.all_special_ids} == special
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        tokenizer.save_pretrained(tmp_path / saved)
        tokenizer = load_tokenizer(tmp_path / saved)


@pytest.mark.parametrize("name", ["Nobodys", "BertJapaneseTokenizer", "PreTrainedTokenizer"])
def test_a_class_that_is_unknown_or_not_fast_beside_a_tokenizer_json(tmp_path, name):
    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    settings = {"tokenizer_class": name, "mask_token": "[MASK]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).mask_token_id == 4


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("bert-base-uncased", "hello world", [101, 7592, 2088, 102]),
        ("roberta-base", "hello world", [0, 42891, 232, 2]),
    ],
)
def test_real_tokenizers(shared, name, text, ids):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id is not None


def test_vocabularies_must_agree():
    bert = tiny.config("bert")
    check_same_vocabulary(bert, tiny.config("distilbert"))
    with pytest.raises(UserError, match="the teacher's has 101 entries, the student's 99, and no tokenizer stands"):
        check_same_vocabulary(bert, tiny.config("bert", vocab_size=99))

    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    check_same_vocabulary(bert, bert, [Words("a", "b"), Words("a", "b")])
    check_same_vocabulary(bert, tiny.config("bert", vocab_size=99), [Words("a", "b"), Words("a", "b")])
    with pytest.raises(UserError, match=r"teacher's tokenizer has 2 entries, the student's 2, and 4 \(token, id\)"):
        check_same_vocabulary(bert, bert, [Words("a", "b"), Words("b", "a")])


@pytest.mark.parametrize("without", [(), ("model_type", "architectures")])
def test_a_vocabulary_alone_is_read_as_autotokenizer_reads_it(tmp_path, caplog, without):
    import tiny_causal
    import tiny_run
    from transformers import BertTokenizerFast, GPT2TokenizerFast

    texts = tiny_run.lines(50)
    for kind, words, made in (
        ("bert", tiny_run.make_tokenizer(texts), BertTokenizerFast),
        ("gpt2", tiny_causal.make_tokenizer(texts), GPT2TokenizerFast),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        words.backend_tokenizer.model.save(str(folder))
        fields = {name: value for name, value in tiny.config(kind).to_dict().items() if name not in without}
        (folder / "config.json").write_text(json.dumps(fields))
        read = load_tokenizer(folder)
        assert type(read) is made and read(texts)["input_ids"] == words(texts)["input_ids"]
        (folder / "config.json").unlink()
        read = load_tokenizer(folder)  # by the kind of the vocabulary
        assert type(read) is made and read(texts)["input_ids"] == words(texts)["input_ids"]
        assert f"is read as that of {kind}" in caplog.text
    (tmp_path / "gpt2" / "merges.txt").unlink()
    refused(lambda: load_tokenizer(tmp_path / "gpt2"), "has no tokenizer", "vocab.json with merges.txt")


@pytest.mark.parametrize(
    ("given", "eos", "sep", "ends", "trained"),
    [
        (2, "w2", None, 2, "w2"),
        ([7, 2], "w2", None, [7, 2], "w2"),
        ([7, 8], "w2", None, [7, 8, 2], "w2"),  # trained texts end with eos
        (None, "w2", "w3", 2, "w2"),
        (7, None, "w3", 7, "w7"),
        (50256, None, "w3", 3, "w3"),
        (None, None, "w3", 3, "w3"),
        (None, None, None, None, None),
    ],
)
def test_texts_end_alike_in_training_and_generation(given, eos, sep, ends, trained):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token=eos, sep_token=sep)
    configs = [tiny.config("gpt2", eos_token_id=given), tiny.config("gpt2", eos_token_id=5)]
    end_texts_alike(tokenizer, *configs)
    assert tokenizer.eos_token == trained
    assert [config.eos_token_id for config in configs] == ([ends, ends] if ends is not None else [None, 5])
    if trained:
        assert vocabulary_of(tokenizer, causal=True).eos in end_ids(configs[1], tokenizer)


def test_a_cased_vocabulary_alone_keeps_capitals(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert load_tokenizer(tmp_path)("The the cat")["input_ids"] == [2, 6, 5, 7, 3]
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:6], "a", "cat"]))
    assert load_tokenizer(tmp_path)("The the cat")["input_ids"] == [2, 5, 5, 7, 3]


@pytest.mark.parametrize("text", ["", "[]", "the\ncat", "\0" * 40])
def test_a_vocabulary_without_its_special_tokens(tmp_path, text):
    (tmp_path / "vocab.txt").write_text(text)
    refused(lambda: load_tokenizer(tmp_path), f"{tmp_path} has no tokenizer that can be read")


def test_further_chat_templates_are_read(tmp_path):
    from transformers import AutoTokenizer

    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    words = load_tokenizer(tmp_path)
    words.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    words.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert load_tokenizer(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert load_tokenizer(tmp_path).chat_template["tool_use"] == "{{ tools }}"


def test_files_that_are_none(tmp_path):
    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).mkdir()
        refused(lambda: load_tokenizer(tmp_path), name, "cannot be read")
        (tmp_path / name).rmdir()
    for text in ("[]", "3", "null", "{", "[" * 100_000, '{"model_max_length": [1]}', '{"model_max_length": "x"}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        refused(lambda: load_tokenizer(tmp_path), str(tmp_path))


# Folders of families whose vocabulary is a SentencePiece model: the file, its kind, what stands beside it, what the
# tokenizer puts around a text.
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
SENTENCEPIECE: dict[str, tuple[str, str, dict, tuple[str, ...]]] = {
    "xlm-roberta": ("sentencepiece.bpe.model", "unigram", {}, ("<s>", "</s>")),
    "albert": ("spiece.model", "unigram", {}, ("[CLS]", "[SEP]")),
    "llama": ("tokenizer.model", "bpe", LLAMA, ("<s>",)),
    "llama that ends": ("tokenizer.model", "bpe", LLAMA | {"add_eos_token": True}, ("<s>", "</s>")),
}


@pytest.fixture(scope="module")
def pieces():
    """A function from the kind of a SentencePiece model to its bytes."""
    from sentencepiece import SentencePieceTrainer

    @functools.cache
    def make(kind):
        made, text = io.BytesIO(), ["the people want peace", "they work for the people", "peace for all of us"] * 20
        SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=made, model_type=kind, vocab_size=40, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
        return made.getvalue()

    return make


@pytest.mark.parametrize("name", SENTENCEPIECE)
@pytest.mark.parametrize("bare", [False, True], ids=["described", "bare"])
def test_a_sentencepiece_model_is_read_as_its_own_library_reads_it(tmp_path, pieces, name, bare):
    from sentencepiece import SentencePieceProcessor

    file, kind, settings, around = SENTENCEPIECE[name]
    if transformers.__version__ >= "5" and ((bare and kind == "bpe") or name == "albert"):
        pytest.skip("transformers 5 puts nothing before such a text, and cannot read an ALBERT without tokenizer.json")
    (tmp_path / file).write_bytes(pieces(kind))
    if not bare:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name.split()[0]}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("they want peace")["input_ids"]
    words = SentencePieceProcessor(model_file=str(tmp_path / file)).encode("they want peace", out_type=str)
    around = around[:1] if bare and kind == "bpe" else around  # nothing says that a text ends
    assert tokenizer.convert_ids_to_tokens(ids) == [around[0], *words, *around[1:]]


def test_a_sentencepiece_model_without_its_library_or_damaged(tmp_path, pieces, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(pieces("bpe")[:100])
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.model is not a SentencePiece model (", "): fetch it again")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.model is a", "pip install 'jaxdistill[sentencepiece]'")
    # A file that nothing needs is not read.
    tokenizer_file(tmp_path, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    assert len(load_tokenizer(tmp_path)) == 7
