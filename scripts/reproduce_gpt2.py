"""Which objective makes the best small summariser? A GPT-2 distilled by each, from the same start, for as many updates.

    python scripts/reproduce_gpt2.py --text 'wikipedia/*.txt' --pairs train.jsonl,validation.jsonl --test test.jsonl \
        --tokenizer gpt2 --workdir runs/gpt2 --out docs/results.md

The example of "Knowledge Distillation of Language Models": a GPT-2 teacher and student on CNN/DailyMail. The teacher is
trained here, on plain text and then on pairs of article and highlights; at full size, on an accelerator, start from the
hub's (`--start gpt2-medium --pretrain-steps 0`) and raise --steps, --rows and --max-length. The student is every other
layer of the teacher, fine-tuned; from there each objective has the same number of updates on the same rows:
cross entropy alone, forward and reverse KL, Jensen-Shannon, and MiniLLM's policy gradient, each with the cross entropy
beside it.

Resumable: the same command goes on. pip install 'jaxdistill[rouge]'.
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
    result_of,
    run,
    seeds_of,
    table,
    write_report,
)

# name -> (recipe, settings). All have a teacher, so that agreement with it is measured of all.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cross entropy alone": ("gpt2_kd.py", {"loss.alpha_ce": 0.0, "loss.alpha_clm": 1.0}),
    "forward KL": ("gpt2_kd.py:forward_kl", {}),
    "reverse KL": ("gpt2_kd.py:reverse_kl", {}),
    "Jensen-Shannon": ("gpt2_kd.py:jsd", {}),
    "policy gradient": ("gpt2_policy.py", {}),
}
COLUMNS = {
    "perplexity": "perplexity",
    "ROUGE-L": "rougeL",
    "KL to the teacher": "kl",
    "same best word": "top1",
    "minutes": "minutes",
}


def on_pairs(flags: argparse.Namespace, *, seed: int, steps: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "data.source": "jsonl",
        "data.path": flags.pairs,
        "data.eval_path": flags.test,
        "data.max_length": flags.max_length,
        "data.buckets": f"({flags.max_length},)",
        "train.steps": steps,
        "train.batch_size": flags.rows,
        "train.accumulation": flags.accumulation,
        "optim.learning_rate": flags.learning_rate,
        "sample.max_new_tokens": flags.max_new_tokens,
        "evaluate.metrics": "('perplexity',)",
        "evaluate.batches": 2,
        "evaluate.batch_size": 8,
        "evaluate.every": steps,
        "checkpoint.every": steps,
        "log.every": 5,
        "export.to": "('pytorch',)",
    }


def make_teacher(flags: argparse.Namespace) -> Path:
    """Trained on plain text, then on pairs; one for all seeds."""
    start = flags.start
    if not start:
        sizes = {"n_embd": flags.width, "n_layer": flags.layers, "n_head": flags.width // 32, "n_positions": 512}
        settings = {
            "student.name": "",
            "student.init": "random",
            "student.overrides": {"model_type": "gpt2", **sizes},
            "tokenizer.name": flags.tokenizer,
            "data.source": "text",
            "data.path": flags.text,
            "data.prompt_column": "",
            "data.batching": "packed",
            "data.max_length": 128,
            "data.buckets": "(128,)",
            "train.steps": flags.pretrain_steps,
            "train.batch_size": 16,
            "train.accumulation": 1,
            "optim.learning_rate": 2e-3,
            "evaluate.metrics": "('perplexity',)",
            "evaluate.batches": 8,
            "evaluate.every": max(flags.pretrain_steps // 4, 1),
            "checkpoint.every": max(flags.pretrain_steps // 4, 1),
            "export.to": "('pytorch',)",
        }
        start = run("gpt2_finetune.py", flags.workdir / "pretrained", settings) / "export-pytorch"
    settings = on_pairs(flags, seed=0, steps=2 * flags.steps) | {"student.name": start}
    return run("gpt2_finetune.py", flags.workdir / "teacher", settings) / "export-pytorch"


def make_start(flags: argparse.Namespace, teacher: Path, *, seed: int) -> Path:
    """Every other layer of the teacher, fine-tuned: what all methods of a seed go on from."""
    from jaxdistill.jobs.cut import Cut, init_student

    base = flags.workdir / f"seed{seed}"
    cut = base / "cut"
    if not cut.exists():
        init_student(Cut(str(teacher), "every_other", seed=seed), cut, allow_pickle=False, report=print)
    settings = on_pairs(flags, seed=100 + seed, steps=flags.steps) | {"student.name": cut}
    return run("gpt2_finetune.py", base / "start", settings) / "export-pytorch"


def measure(flags: argparse.Namespace, workdir: Path, *, teacher: Path | None) -> Figures:
    """The test pairs: perplexity of all that are asked for, ROUGE of the first --rouge-rows."""

    def figures() -> dict[str, float]:
        from jaxdistill.jobs.measure import evaluate

        overrides = [
            f"--config.evaluate.batches={flags.batches}",
            f"--config.evaluate.rouge_rows={flags.rouge_rows}",
            f"--config.evaluate.max_new_tokens={flags.max_new_tokens}",
            f"--config.teacher.name={teacher or ''}",
        ]
        found = evaluate(
            workdir,
            step=None,
            metrics=["perplexity", "rouge", *(["agreement"] if teacher else [])],
            overrides=overrides,
            allow_pickle=False,
            report=print,
            predictions=workdir / "predictions.json",
        )
        return found | json.loads((workdir / "done.json").read_text())

    return measured(workdir, figures)


def run_seed(flags: argparse.Namespace, teacher: Path, *, seed: int) -> None:
    start = make_start(flags, teacher, seed=seed)
    measure(flags, start.parent, teacher=teacher)
    for name in arms_of(flags, METHODS):
        recipe, changes = METHODS[name]
        settings = on_pairs(flags, seed=seed, steps=flags.steps) | changes
        settings |= {"teacher.name": teacher, "student.name": start, "export.to": "()"}
        measure(flags, run(recipe, folder_of(flags.workdir, seed, name), settings), teacher=teacher)


def report(flags: argparse.Namespace) -> None:
    """The table of all complete seeds."""
    arms = arms_of(flags, METHODS)
    seeds = complete_seeds(flags.workdir, ["start", *arms])
    if not seeds:
        return
    results = {name: [result_of(folder_of(flags.workdir, seed, name)) for seed in seeds] for name in ("start", *arms)}
    rows = {"teacher": [result_of(flags.workdir / "teacher")], "the students' start": results.pop("start"), **results}
    lines = table("student", rows, COLUMNS, digits={"perplexity": 1, "minutes": 1})
    write_report(flags, seeds, ["\n".join(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description="A GPT-2 summariser distilled by each objective, over several seeds.")
    parser.add_argument("--text", default="", help="plain text for the teacher, a file or a quoted glob")
    parser.add_argument("--pairs", required=True, help="JSONL with article and highlights, several with commas")
    parser.add_argument("--test", required=True, help="JSONL with article and highlights")
    parser.add_argument("--tokenizer", default="gpt2", help="folder or hub name")
    parser.add_argument("--start", default="", help="a GPT-2 to fine-tune as the teacher, in place of one trained here")
    add_flags(parser, section="gpt2", arms=METHODS)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pretrain-steps", type=int, default=500, help="of 16 rows of 128 tokens")
    parser.add_argument("--steps", type=int, default=80, help="of a method; the teacher has twice as many")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=160, help="tokens of article and highlights together")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batches", type=int, default=16, help="of 8 rows, for the final perplexity; 0 = all")
    parser.add_argument("--rouge-rows", type=int, default=100)
    flags = parser.parse_args()
    arms_of(flags, METHODS)
    teacher = make_teacher(flags)
    measure(flags, teacher.parent, teacher=None)
    for seed in seeds_of(flags):
        run_seed(flags, teacher, seed=seed)
    report(flags)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
