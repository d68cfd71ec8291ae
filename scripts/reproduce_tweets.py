"""Does a student of a model of tweets keep the words of the street, at half of its depth?

    python scripts/reproduce_tweets.py --tweets tweets.txt --dev dev.txt --text 'wikipedia/*.txt' \
        --workdir runs/tweets --out docs/results.md

The description of a distilled model of tweets shows the nearest words of `ma`, `af`, `lmao` and `Yeah` in it and in the
RoBERTa that its teacher was made from, and concludes that it captures the language of Twitter better than that RoBERTa.
The same three models are made here, and are small: a base RoBERTa is trained from random weights on plain text, the
teacher goes on from it with tweets, and the student is every other layer of the teacher, distilled on tweets by the
recipe configs/roberta_tweets.py. A second student has the same start and no teacher. Besides the nearest words, all are
measured by held-out tweets: the masked-LM loss, and how often their best word is the teacher's.

The tokenizer is a byte-level BPE of the two texts, with few words, as the text is short. Base, teacher and tokenizer
are one for all seeds. Resumable: the same command goes on. On an accelerator, start from published models:

    python scripts/reproduce_tweets.py --base roberta-base --teacher cardiffnlp/twitter-roberta-base --rows 512 ...
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from experiment import (
    Figures,
    add_flags,
    arms_of,
    complete_seeds,
    folder_of,
    measured,
    paired_table,
    result_of,
    run,
    seeds_of,
    table,
    write_report,
    write_text,
)

STUDENT = "student"
ARMS: dict[str, dict[str, Any]] = {
    STUDENT: {},
    "student without a teacher": {"loss.alpha_ce": 0.0, "loss.alpha_cos": 0.0},
}
WORDS = ("ma", "af", "lmao", "Yeah")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4; RoBERTa's configuration says 0, 1 and 2
COLUMNS = {
    "loss": "mlm_loss",
    "perplexity": "perplexity",
    "accuracy": "mlm_accuracy",
    "KL to the teacher": "kl",
    "same best word": "top1",
    "minutes": "minutes",
}
DIGITS = {"perplexity": 1, "minutes": 1}
COMPARED = {name: key for name, key in COLUMNS.items() if key in ("mlm_loss", "mlm_accuracy", "kl", "top1")}


def write_tokenizer(flags: argparse.Namespace, text: dict[str, Path]) -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import RobertaTokenizerFast

    folder = flags.workdir / "tokenizer"
    if not folder.exists():
        bpe = ByteLevelBPETokenizer()
        files = [str(text["text"]), str(text["tweets"])]
        bpe.train(files, vocab_size=flags.vocabulary, special_tokens=list(SPECIAL), show_progress=False)
        bpe.post_processor = RobertaProcessing(sep=("</s>", 2), cls=("<s>", 0))  # type: ignore[assignment]
        RobertaTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=128).save_pretrained(folder)
    return folder


def plain_settings(flags: argparse.Namespace, text: dict[str, Path]) -> dict[str, Any]:
    """Masked language modelling without a teacher, for the base and for the teacher."""
    return {
        "student.overrides": {
            "model_type": "roberta",
            "vocab_size": flags.vocabulary,
            "hidden_size": flags.width,
            "num_hidden_layers": flags.layers,
            "num_attention_heads": flags.width // 32,
            "intermediate_size": 4 * flags.width,
            "max_position_embeddings": 130,
            "type_vocab_size": 1,
            "initializer_range": flags.width**-0.5,
            "hidden_dropout_prob": 0.0,  # every pass has new masks, and the model underfits
            "attention_probs_dropout_prob": 0.0,
        },
        "tokenizer.name": write_tokenizer(flags, text),
        "data.batching": "packed",
        "data.max_length": 64,
        "data.buckets": "(64,)",
        "data.min_tokens": 6,
        "train.batch_size": flags.rows,
        "optim.learning_rate": flags.learning_rate,
        "evaluate.prompts": "()",
        "export.to": "('pytorch',)",
    }


def make_base(flags: argparse.Namespace, text: dict[str, Path]) -> str:
    if flags.base:
        return flags.base
    settings = {"data.path": text["text"], **often(flags.base_steps)}
    run("quickstart_teacher.py", flags.workdir / "base", plain_settings(flags, text) | settings)
    return str(flags.workdir / "base" / "export-pytorch")


def make_teacher(flags: argparse.Namespace, text: dict[str, Path], base: str) -> str:
    """The base, trained further on tweets, in rounds that begin where the last ended (warm restarts)."""
    if flags.teacher:
        return flags.teacher
    teacher = base
    for i in range(flags.teacher_rounds):
        settings = {"seed": i, "student.name": teacher, "data.path": text["tweets"], "data.eval_path": text["dev"]}
        settings |= often(flags.teacher_steps)
        workdir = flags.workdir / f"teacher{i}"
        run("quickstart_teacher.py", workdir, plain_settings(flags, text) | settings)
        teacher = str(workdir / "export-pytorch")
    return teacher


def often(steps: int) -> dict[str, Any]:
    """A run of so many updates, which is measured and saved a few times."""
    return {
        "train.steps": steps,
        "train.accumulation": 1,
        "evaluate.every": max(steps // 4, 1),
        "evaluate.batches": 8,
        "checkpoint.every": max(steps // 4, 1),
        "checkpoint.keep": 1,
        "log.every": max(steps // 100, 1),
    }


def student_settings(flags: argparse.Namespace, text: dict[str, Path], teacher: str) -> dict[str, Any]:
    return {
        "teacher.name": teacher,
        "data.path": text["tweets"],
        "data.eval_path": text["dev"],
        "data.batching": "packed",
        "data.buckets": "(64,)",
        "train.batch_size": flags.rows,
        "evaluate.prompts": "()",
        "evaluate.metrics": "('perplexity', 'agreement')",
    } | often(flags.steps)


def measure(flags: argparse.Namespace, workdir: Path) -> Figures:
    """Held-out tweets, masked uniformly, student and teacher alike."""

    def figures() -> Figures:
        import jaxdistill

        settings = {"mask.smoothing": 0.0, "evaluate.batches": flags.batches}
        found = jaxdistill.evaluate(workdir, settings=settings)
        return found | json.loads((workdir / "done.json").read_text())

    return measured(workdir, figures)


def of_another(flags: argparse.Namespace, name: str, model: str) -> Figures:
    """The same held-out tweets and masks for a model that no run trained."""

    def figures() -> Figures:
        from jaxdistill.jobs import measure

        run_folder = folder_of(flags.workdir, seeds_of(flags)[0], STUDENT)
        overrides = ["--config.mask.smoothing=0", f"--config.evaluate.batches={flags.batches}"]
        config = measure.config_of_run(run_folder, overrides)
        return measure.evaluate_model(model, config, revision="", metrics=None, allow_pickle=False, report=print)

    return measured(flags.workdir / "measured" / name, figures)


def nearest(flags: argparse.Namespace, models: dict[str, str]) -> list[str]:
    """The words whose embeddings lie nearest, with their cosines, as a table of Markdown."""
    from jaxdistill.jobs.neighbours import compare_neighbours

    found = compare_neighbours(
        models, flags.words.split(","), top=flags.top, step="last", allow_pickle=False, report=print
    )
    lines = ["| word | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for i, word in enumerate(found.words):
        cells = [", ".join(f"{near} ({cosine:.3f})" for near, cosine in of[i]) for of in found.models.values()]
        lines.append(f"| {word} | " + " | ".join(cells) + " |")
    return lines


def report(flags: argparse.Namespace, base: str, teacher: str) -> None:
    """The tables of all complete seeds."""
    arms = arms_of(flags, ARMS)
    seeds = complete_seeds(flags.workdir, arms)
    if not seeds:
        return
    results = {arm: [result_of(folder_of(flags.workdir, seed, arm)) for seed in seeds] for arm in arms}
    others = {"base": of_another(flags, "base", base), "teacher": of_another(flags, "teacher", teacher)}
    rows = {name: [figures] for name, figures in others.items()} | results
    first = folder_of(flags.workdir, seeds[0], arms[0])
    said = [table("model, on held-out tweets", rows, COLUMNS, DIGITS)]
    if arms[0] == STUDENT and len(arms) > 1:
        rest = {arm: results[arm] for arm in arms[1:]}
        said.append(paired_table("difference to the student", rest, results[STUDENT], COMPARED))
    said.append(nearest(flags, {"teacher": teacher, "student": str(first), "base": base}))
    write_report(flags, seeds, ["\n".join(lines) for lines in said])


def main() -> None:
    parser = argparse.ArgumentParser(description="A RoBERTa of tweets and its student, over several seeds.")
    add_flags(parser, section="tweets", arms=ARMS)
    parser.add_argument("--tweets", required=True, help="tweets for training, one a line; files or quoted globs")
    parser.add_argument("--dev", required=True, help="held-out tweets")
    parser.add_argument("--text", required=True, help="plain text for the base; files or quoted globs")
    parser.add_argument("--base", default="", help="a RoBERTa, in place of one trained here")
    parser.add_argument("--teacher", default="", help="a RoBERTa of tweets, in place of one trained here")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help="of 64 tokens, in an update")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="of base and teacher")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--teacher-rounds", type=int, default=2, help="of so many updates each:")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400, help="updates of the students")
    parser.add_argument("--batches", type=int, default=32, help="of 32 rows, of each final measurement; 0 = all")
    parser.add_argument("--words", default=",".join(WORDS), help="whose nearest words are shown")
    parser.add_argument("--top", type=int, default=3)
    flags = parser.parse_args()
    arms = arms_of(flags, ARMS)
    splits = {"tweets": flags.tweets, "dev": flags.dev, "text": flags.text}
    text = {name: write_text(value, f"--{name}", flags.workdir / f"text/{name}.txt") for name, value in splits.items()}
    base = make_base(flags, text)
    teacher = make_teacher(flags, text, base)
    for seed in seeds_of(flags):
        for arm in arms:
            settings = student_settings(flags, text, teacher) | {"seed": seed} | ARMS[arm]
            measure(flags, run("roberta_tweets.py", folder_of(flags.workdir, seed, arm), settings))
    report(flags, base, teacher)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
