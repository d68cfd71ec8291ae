"""Makes what the quickstart needs and the repository carries: text, tokenizer and teacher.

    python scripts/make_quickstart.py --text state_of_the_union.txt.gz --workdir runs/quickstart-teacher

--text is the State of the Union addresses, 1790 to today, one address a line (works of the United States
government, in the public domain); the last ADDRESSES of them, since about 1900, are taken. The teacher is a 4-layer,
128-wide BERT trained from scratch by this package, by the recipe configs/quickstart_teacher.py, on the same text that
the quickstart distils on. All of it lands in configs/quickstart/.
"""

import argparse
import gzip
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = 120
VOCABULARY = 4000
ROUNDS = 2  # of the recipe, each from where the last ended: warm restarts (Loshchilov and Hutter 2017)
LINE = 360  # characters: about the 64 tokens of a quickstart row
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

    from jaxdistill import config, loop

    QUICKSTART.mkdir(exist_ok=True)
    corpus, tokenizer = QUICKSTART / "corpus.txt.gz", flags.workdir / "tokenizer"
    write_corpus(flags.text, corpus)
    write_tokenizer(corpus, tokenizer)
    recipe = str(QUICKSTART.parent / "quickstart_teacher.py")
    common = [f"--config.tokenizer.name={tokenizer}", *overrides]
    rounds = [flags.workdir / f"round{i}" for i in range(ROUNDS)]
    for i, workdir in enumerate(rounds):
        begin = [f"--config.student.name={rounds[i - 1]}"] if i else []
        loop.run(config.parse(recipe, [*common, *begin, f"--config.seed={i}"]), workdir)
    loop.export_run(rounds[-1], QUICKSTART / "teacher", to="pytorch", tell=print)
    halve(QUICKSTART / "teacher" / "model.safetensors")


if __name__ == "__main__":
    main()
