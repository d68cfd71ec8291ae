"""A whole causal run in seconds: pairs in a CSV, tokenizer, teacher and recipe, all made here."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_run
from tiny_run import Tiny

RECIPE = """
from jaxdistill.config import base


def get_config(variant=""):
    config = base()
    config.teacher.name = {teacher!r}
    config.data.source = "csv"
    config.data.path = {text!r}
    config.data.prompt_column, config.data.column = "article", "highlights"
    config.data.template = "{{prompt}} => {{completion}}"
    config.data.cache_dir = {cache!r}
    config.data.max_length = 32
    config.data.min_tokens = 4
    config.data.buckets = (32,)
    config.data.eval_fraction = 0.1
    config.mask.group = 1
    config.loss.tokens = "labels"
    config.loss.alpha_cos = 0.0
    config.sample.max_new_tokens = 8
    config.train.steps = 4
    config.train.batch_size = 16
    config.evaluate.batches = 2
    config.evaluate.batch_size = 8
    config.evaluate.max_new_tokens = 8
    config.evaluate.rouge_rows = 8
    config.log.every = 1
    return config
"""


def make_tokenizer(texts: Sequence[str], *, vocab_size: int = 300, begins: bool = False) -> Any:
    """Byte-level BPE with GPT-2's one special token; with `begins` a text begins with it, as Llama's with <s>."""
    import tokenizers
    from transformers import GPT2TokenizerFast

    bpe = tokenizers.ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[end], show_progress=False)
    if begins:
        bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{end} $A", pair=f"{end} $A $B", special_tokens=[(end, bpe.token_to_id(end))]
        )
    return GPT2TokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, unk_token=end)


def pairs(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Lines as articles, and their first three words as summaries."""
    return [(line, " ".join(line.split()[:3])) for line in tiny_run.lines(count, seed=seed)]


def write_pairs(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("id", "article", "highlights"), *((i, *row) for i, row in enumerate(rows))])
    return path


def write_model(folder: Path, tokenizer: Any, *, kind: str = "gpt2", seed: int = 0, **fields: Any) -> Path:
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end}
    return tiny_run.write_model(folder, tokenizer, kind=kind, seed=seed, **ids, **fields)


def make(folder: Path, *, count: int = 200, kind: str = "gpt2", begins: bool = False, **fields: Any) -> Tiny:
    """The folder `student`, beside the teacher, has another model of the same kind with two layers."""
    rows = pairs(count)
    text = write_pairs(folder / "pairs.csv", rows)
    tokenizer = make_tokenizer([*(f"{article} => {highlights}" for article, highlights in rows)], begins=begins)
    teacher = write_model(folder / "teacher", tokenizer, kind=kind, **fields)
    write_model(folder / "student", tokenizer, kind=kind, seed=1, **{**fields, "num_hidden_layers": 2})
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(teacher=str(teacher), text=str(text), cache=str(folder / "cache")))
    return Tiny(folder, text, teacher, recipe)
