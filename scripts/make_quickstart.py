"""Makes what the quickstart needs and the repository carries: text, tokenizer and teacher, masked and causal.

    python scripts/make_quickstart.py --text state_of_the_union.txt.gz --workdir runs/quickstart-teacher

--text is the State of the Union addresses, 1790 to today, one address a line (works of the United States government,
in the public domain); the last ADDRESSES of them, since about 1900, are taken. The teacher is a 4-layer, 128-wide
BERT trained from scratch by this package, by the recipe configs/quickstart_teacher.py, on the same text that the
quickstart distils on. The causal teacher is a 2-layer, 64-wide GPT-2, for the smoke variants of the gpt2 recipes, as
are pairs.csv: the beginning of a line and its last sentence. The smoke variants of modernbert_mlm, qwen3_kd,
gemma3_kd and llama3_kd have 64-wide teachers of their own. All of it lands in configs/quickstart/.
"""

import argparse
import csv
import gzip
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ADDRESSES = 120
VOCABULARY = 4000
CAUSAL_VOCABULARY = 1024
PAIRS = 400
ROUNDS = 2  # of the recipe, each from where the last ended: warm restarts (Loshchilov and Hutter 2017)
LINE = 360  # characters: about the 64 tokens of a quickstart row
# Of the small models of today's kinds.
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_MODERN = {**_SIZES, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart"


def lines_of(text: str) -> Iterator[str]:
    """Sentences of the last ADDRESSES, joined to lines of about LINE characters."""
    for address in [line for line in text.splitlines() if line.strip()][-ADDRESSES:]:
        line = ""
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(address.split())):
            if line and len(line) + len(sentence) > LINE:
                yield line
                line = ""
            line = f"{line} {sentence}".strip()
        if line:
            yield line


def write_corpus(source: Path, target: Path) -> None:
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = list(lines_of(file.read()))
    random.Random(0).shuffle(lines)  # the tail is held out, and must not be the last presidents alone
    with open(target, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        file.write(
            "".join(f"{line}\n" for line in lines).encode()
        )  # no name and no time in the header: the same text gives the same file


def write_tokenizer(corpus: Path, folder: Path) -> None:
    """A lower-case WordPiece of VOCABULARY pieces, as BERT's."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    pieces = BertWordPieceTokenizer(lowercase=True)
    with gzip.open(corpus, "rt", encoding="utf-8") as file:
        pieces.train_from_iterator(file, vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    BertTokenizerFast(tokenizer_object=pieces._tokenizer, do_lower_case=True, model_max_length=128).save_pretrained(
        folder
    )


def write_causal_tokenizer(corpus: Path, folder: Path) -> None:
    """A byte-level BPE of CAUSAL_VOCABULARY tokens, with GPT-2's one special token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    end = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    with gzip.open(corpus, "rt", encoding="utf-8") as file:
        bpe.train_from_iterator(file, vocab_size=CAUSAL_VOCABULARY, special_tokens=[end], show_progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    GPT2TokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=128, **special).save_pretrained(folder)


def write_pairs(corpus: Path, target: Path) -> None:
    """The first PAIRS lines of three sentences and more, as all but the last and the last."""
    with gzip.open(corpus, "rt", encoding="utf-8") as file:
        split = (re.split(r"(?<=[.!?])\s+", line.strip()) for line in file)
        pairs = [(" ".join(sentences[:-1]), sentences[-1]) for sentences in split if len(sentences) >= 3][:PAIRS]
    with target.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("article", "highlights"), *pairs])


# Folder of a small causal model -> the fields of its architecture.
CAUSAL: dict[str, dict[str, Any]] = {
    "causal": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "qwen3": {"model_type": "qwen3", **_MODERN},
    "gemma3": {
        "model_type": "gemma3_text",
        **_MODERN,
        "num_hidden_layers": 4,
        "sliding_window": 32,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "query_pre_attn_scalar": 32,
    },
    "llama3": {
        "model_type": "llama",
        **_MODERN,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def make_causal(corpus: Path, work: Path, name: str, overrides: list[str]) -> None:
    """A small causal model, trained by the recipe configs/gpt2_finetune.py on the lines of the corpus."""
    from jaxdistill import recipe as recipes
    from jaxdistill.run import loop

    tokenizer = work / "causal-tokenizer"
    write_causal_tokenizer(corpus, tokenizer)
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    values = {
        "student.name": "",
        "student.init": "random",
        "student.overrides": {**CAUSAL[name], "vocab_size": CAUSAL_VOCABULARY, **special},
        "tokenizer.name": tokenizer,
        "data.source": "text",
        "data.path": corpus,
        "data.prompt_column": "",
        "data.batching": "packed",
        "data.max_length": 128,
        "data.buckets": "(128,)",
        "train.steps": 1500,
        "train.batch_size": 16,
        "train.accumulation": 1,
        "optim.learning_rate": 3e-3,
        "evaluate.metrics": "('perplexity',)",
        "evaluate.every": 500,
        "checkpoint.every": 500,
    }
    given = [f"--config.{key}={value}" for key, value in values.items()]
    loop.run(recipes.read(str(QUICKSTART.parent / "gpt2_finetune.py"), [*given, *overrides]), work / name)
    _export(work / name, QUICKSTART / name)


def make_modernbert(work: Path, overrides: list[str]) -> None:
    """A small ModernBERT, trained by the recipe of the quickstart's BERT and with its tokenizer."""
    from jaxdistill import recipe as recipes
    from jaxdistill.run import loop

    sizes = {"model_type": "modernbert", "vocab_size": VOCABULARY, **_SIZES, "num_hidden_layers": 4}
    of_windows = {"local_attention": 32, "global_attn_every_n_layers": 2}
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    given = [f"--config.student.overrides={ {**sizes, **of_windows, **special} }", "--config.train.steps=1500"]
    recipe = str(QUICKSTART.parent / "quickstart_teacher.py")
    loop.run(
        recipes.read(recipe, [f"--config.tokenizer.name={QUICKSTART / 'teacher'}", *given, *overrides]),
        work / "modernbert",
    )
    _export(work / "modernbert", QUICKSTART / "modernbert")


def _export(workdir: Path, folder: Path) -> None:
    from jaxdistill.run.export import export_run

    export_run(workdir, folder, to="pytorch", report=print)
    halve(folder / "model.safetensors")


def halve(weights: Path) -> None:
    """float32 to float16: half the bytes in the repository, upcast again when they are read."""
    from safetensors.numpy import load_file, save_file

    halved = {name: tensor.astype("float16") for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    shutil.copymode(weights.with_name("config.json"), weights)  # it writes for the owner alone


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the text, tokenizer and teacher of the quickstart.")
    parser.add_argument("--text", required=True, type=Path, help="state_of_the_union.txt.gz")
    parser.add_argument("--workdir", required=True, type=Path, help="folder for the rounds; resumed where they stand")
    flags, overrides = parser.parse_known_args()

    from jaxdistill import recipe as recipes
    from jaxdistill.run import loop

    QUICKSTART.mkdir(exist_ok=True)
    corpus, tokenizer = QUICKSTART / "corpus.txt.gz", flags.workdir / "tokenizer"
    write_corpus(flags.text, corpus)
    write_tokenizer(corpus, tokenizer)
    recipe = str(QUICKSTART.parent / "quickstart_teacher.py")
    common = [f"--config.tokenizer.name={tokenizer}", *overrides]
    rounds = [flags.workdir / f"round{i}" for i in range(ROUNDS)]
    for i, workdir in enumerate(rounds):
        begin = [f"--config.student.name={rounds[i - 1]}"] if i else []
        loop.run(recipes.read(recipe, [*common, *begin, f"--config.seed={i}"]), workdir)
    _export(rounds[-1], QUICKSTART / "teacher")
    write_pairs(corpus, QUICKSTART / "pairs.csv")
    make_modernbert(flags.workdir, overrides)
    for name in CAUSAL:
        make_causal(corpus, flags.workdir, name, overrides)


if __name__ == "__main__":
    main()
