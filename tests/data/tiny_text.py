"""Small texts, tokenizers and prepared folders of the tests beside this file."""

import json

import numpy as np

from jaxdistill.data.prepare import prepare
from jaxdistill.data.settings import DataConfig
from jaxdistill.data.store import open_store
from jaxdistill.data.text import open_source

LINES = [
    "the cat sat on the mat and looked at the dog",
    "the dog sat",
    "a bird flew over the house and the cat looked at the bird and the dog looked at the cat",
    "☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ the cat",
    "house",
]
TEMPLATE = "Say it: {prompt}\nTL;DR: {completion}"
PAIRS = [
    ("the cat sat on the mat and looked at the dog", "the cat sat"),
    ("a bird {prompt} flew over the house", "bird {completion} {0}"),
    ("the dog sat " * 30 + "down", "the dog"),
    ("house", "the cat and the dog and the bird and the house and" + " the mat" * 40),
    ("the end of the cat", "a"),
]


def train_tokenizer(lines, **settings):
    import tokenizers
    from transformers import BertTokenizerFast

    wordpiece = tokenizers.BertWordPieceTokenizer(**settings)
    wordpiece.train_from_iterator(lines, vocab_size=90, min_frequency=1, show_progress=False)
    return BertTokenizerFast(tokenizer_object=wordpiece._tokenizer)


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


def text_source(path, lines=LINES, **settings):
    path.write_text("".join(line + "\n" for line in lines))
    return open_source(DataConfig(source="text", **settings), path=str(path), split="")


def pair_source(path, pairs=PAIRS):
    path.write_text("".join(json.dumps({"q": prompt, "a": answer}) + "\n" for prompt, answer in pairs))
    return open_source(DataConfig(source="jsonl", column="a", prompt_column="q"), path=str(path), split="")


def prepared(source, tokenizer, cache, *, pack=False, template="", causal=False, report=lambda line: None, **settings):
    """The folder; settings need not keep to the rules of DataConfig, and with a template the source has pairs."""
    settings = {"max_length": 16, "min_tokens": 4, "max_unk_fraction": 0.5, **settings}
    if template:
        settings |= {"template": template, "prompt_column": "q"}
    data = DataConfig(cache_dir=str(cache), batching="packed" if pack else "length").model_copy(update=settings)
    return prepare(data, source, tokenizer, causal=causal, report=report)


def opened(source, tokenizer, cache, **settings):
    """The store of a folder prepared for causal models."""
    return open_store(prepared(source, tokenizer, cache, causal=True, **settings))


def rows_of(store):
    return [store[row].tolist() for row in range(len(store))]


def documents_of(store):
    """Token lists of the documents, and how many of each are prompt."""
    return [part.tolist() for part in np.split(store.tokens[:], store.documents[1:-1])], store.prompts.tolist()


def prefix_ids(tokenizer):
    """The ids that the tokenizers here put before a text."""
    return [1] if tokenizer.bos_token == "<s>" else []


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


def cut_file(path, by):
    path.write_bytes(path.read_bytes()[:-by])
