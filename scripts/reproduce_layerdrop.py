"""Does a teacher trained with LayerDrop, cut to every other layer, give a better student?

    python scripts/reproduce_layerdrop.py --train 'wikipedia/*.txt' --valid wiki.valid.tokens --test wiki.test.tokens \
        --workdir runs/layerdrop --out docs/results.md

The claim of "A Robust Initialization Method for Knowledge Distillation", whose evidence is one seed. For each seed,
teachers at LayerDrop rates 0, 0.1 and 0.2, each cut to every other layer (a DistilBERT), then distilled by the recipe
configs/bert_mlm.py. Two things change at once there, what the student starts from and whom it learns from; so the
LayerDrop starts are also distilled from the plain teacher, and so is a random start. All arms of a seed share data
order, masks and the teachers' start, and differences are tested in pairs.

Teachers go on from --start for --teacher-steps updates of 16 rows of 64 tokens. Resumable: the same command goes on.
Seeds may run side by side in several processes (--seeds 0,1 and --seeds 2,3,4); the report, tables and a plot, is of
all that are complete. pip install 'jaxdistill[report]' for the plot.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import (
    ROOT,
    Figures,
    complete_seeds,
    draw_band,
    measured,
    paired_table,
    records,
    run,
    save_figure,
    table,
    write_between,
    write_text,
)

RATES = (0.0, 0.1, 0.2)
# (what the student starts from, its teacher's rate): a rate, or None for random weights.
Arm = tuple[float | None, float]
ARMS: tuple[Arm, ...] = ((0.0, 0.0), (0.1, 0.1), (0.2, 0.2), (0.1, 0.0), (0.2, 0.0), (None, 0.0))
BASELINE = (0.0, 0.0)
KEPT = "every_other"


def teacher(flags: argparse.Namespace, text: dict[str, Path], *, seed: int, rate: float) -> Path:
    settings = common(flags, text, seed=seed, steps=flags.teacher_steps) | {
        "student.name": flags.start,
        "student.layer_drop": rate,
        "train.accumulation": 1,
        "optim.learning_rate": 5e-4,
        "export.to": "('pytorch',)",
        "tokenizer.name": flags.start,
        "evaluate.pruned": f"('{KEPT}',)",
    }
    return run("bert_layerdrop_teacher.py", folders(flags.workdir, seed)[rate], settings)


def student(
    flags: argparse.Namespace, text: dict[str, Path], *, seed: int, arm: Arm, teachers: dict[float, Path]
) -> Path:
    from jaxdistill.run.cut import Cut, init_student

    start, taught = arm[0], teachers[arm[1]]
    settings = common(flags, text, seed=seed, steps=flags.student_steps) | {
        "teacher.name": taught / "export-pytorch",
        "student.family": "",
        "train.accumulation": 1,
        "train.freeze": "('position_embeddings',)",
        "evaluate.prompts": "()",
    }
    if start is None:
        settings |= {"student.init": "random", "student.overrides": {"num_hidden_layers": layers_kept(taught)}}
        settings |= {"train.freeze": "()"}  # positions that were never trained
    else:
        folder = teachers[start] / "cut"
        if not folder.exists():
            cut = Cut(str(teachers[start] / "export-pytorch"), KEPT, family="distilbert", seed=seed)
            init_student(cut, folder, allow_pickle=False, report=print)
        settings |= {"student.name": folder}
    return run("bert_mlm.py", folders(flags.workdir, seed)[arm], settings)


def common(flags: argparse.Namespace, text: dict[str, Path], *, seed: int, steps: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "data.path": text["train"],
        "data.eval_path": text["valid"],
        "data.batching": "packed",
        "data.max_length": 64,
        "train.steps": steps,
        "train.batch_size": 16,
        "evaluate.every": max(steps // 6, 1),
        "evaluate.batches": 16,
        "checkpoint.every": max(steps // 4, 1),
        "checkpoint.keep": 1,
        "log.every": 5,
    }


def layers_kept(folder: Path) -> int:
    config = json.loads((folder / "student" / "config.json").read_text())
    return (config["num_hidden_layers"] + 1) // 2


def measure(flags: argparse.Namespace, text: dict[str, Path], workdir: Path) -> Figures:
    """Validation and test text, and training loss over the last tenth and on average."""

    def figures() -> dict[str, float]:
        from jaxdistill.run.measure import evaluate

        found: dict[str, float] = {}
        for split in ("valid", "test"):
            overrides = [f"--config.data.eval_path={text[split]}", f"--config.evaluate.batches={flags.batches}"]
            of_split = evaluate(workdir, step=None, metrics=None, overrides=overrides, allow_pickle=False, report=print)
            found |= {f"{split}/{name}": value for name, value in of_split.items()}
        losses = [record["loss"] for record in records(workdir, "train")]
        last = losses[-max(len(losses) // 10, 1) :]
        return found | {"train/last": sum(last) / len(last), "train/average": sum(losses) / len(losses)}

    return measured(workdir, figures)


def run_seed(flags: argparse.Namespace, text: dict[str, Path], *, seed: int) -> None:
    teachers = {rate: teacher(flags, text, seed=seed, rate=rate) for rate in RATES}
    for workdir in teachers.values():
        measure(flags, text, workdir)
    for arm in ARMS:
        measure(flags, text, student(flags, text, seed=seed, arm=arm, teachers=teachers))
    (flags.workdir / f"seed{seed}" / "complete").touch()


def name_of(arm: Arm) -> str:
    start, taught = arm
    source = "random weights" if start is None else f"every other layer of teacher {start:g}"
    return f"{source}, taught by teacher {taught:g}"


def folders(workdir: Path, seed: int) -> dict[Any, Path]:
    """The runs of a seed: teachers by rate, students by arm."""
    base = workdir / f"seed{seed}"
    names = {arm: "random" if arm[0] is None else f"{arm[0]:g}" for arm in ARMS}
    return {rate: base / f"teacher-{rate:g}" for rate in RATES} | {
        arm: base / f"student-{names[arm]}-of-teacher-{arm[1]:g}" for arm in ARMS
    }


def report(flags: argparse.Namespace) -> None:
    """The table and the curves of all complete seeds."""
    seeds = complete_seeds(flags.workdir)
    if not seeds:
        return
    runs = [folders(flags.workdir, seed) for seed in seeds]
    results = {key: [json.loads((run[key] / "result.json").read_text()) for run in runs] for key in runs[0]}
    teachers = {f"teacher, rate {rate:g}": results[rate] for rate in RATES}
    students = {name_of(arm): results[arm] for arm in ARMS}
    others = {name_of(arm): results[arm] for arm in ARMS if arm != BASELINE}
    tables = [
        table("", teachers, TEACHER_COLUMNS),
        table("student: start, teacher", students, STUDENT_COLUMNS),
        paired_table("difference to the first student", others, results[BASELINE], STUDENT_COLUMNS),
    ]
    said = "\n\n".join("\n".join(lines) for lines in [[f"Seeds {', '.join(map(str, seeds))}."], *tables])
    out = flags.out or flags.workdir / "results.md"
    write_between(out, "layerdrop", said)
    curves = out.with_name("layerdrop.png")
    draw(runs, curves)
    print(f"{said}\n\n{out} has these tables of {len(seeds)} seeds, {curves} the curves")


TEACHER_COLUMNS = {
    "train loss": "train/last",
    "validation": "valid/mlm_loss",
    "test": "test/mlm_loss",
    "cut, validation": f"valid/mlm_loss/{KEPT}",
    "cut, test": f"test/mlm_loss/{KEPT}",
}
STUDENT_COLUMNS = {
    "last loss": "train/last",
    "average loss": "train/average",
    "validation": "valid/mlm_loss",
    "test": "test/mlm_loss",
    "KL to its teacher, test": "test/kl",
    "same best word, test": "test/top1",
}


def draw(runs: Sequence[dict[Any, Path]], path: Path) -> None:
    """Held-out loss over updates, mean and range over seeds: teachers whole and cut, students."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)

    def curve(axes: Any, key: Any, figure: str, label: str, **style: Any) -> None:
        curves = [[(record["step"], record[figure]) for record in records(run[key], "eval")] for run in runs]
        draw_band(axes, curves, label, **style)

    for i, rate in enumerate(RATES):
        curve(left, rate, "mlm_loss", f"rate {rate:g}", color=f"C{i}")
        curve(left, rate, f"mlm_loss/{KEPT}", f"rate {rate:g}, cut", color=f"C{i}", linestyle="--")
    for i, (start, taught) in enumerate(ARMS):
        label = "random" if start is None else f"cut of {start:g}"
        style = "-" if start == taught else "--"
        color = f"C{RATES.index(start)}" if start is not None else "0.5"
        curve(right, ARMS[i], "mlm_loss", f"{label}, teacher {taught:g}", linestyle=style, color=color)
    left.set(title="Teachers: whole, and cut to every other layer", xlabel="updates")
    right.set(title="Students: what they start from, who teaches", xlabel="updates")
    for axes, top in ((left, 0.85), (right, 0.65)):  # where a legend hides no curve
        axes.set_ylabel("held-out masked-LM loss, nats")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, top))
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="LayerDrop teachers, pruned and distilled, over several seeds.")
    parser.add_argument("--train", required=True, help="text file or quoted glob; WikiText-2's training split fits")
    parser.add_argument("--valid", required=True, help="WikiText-2's validation split")
    parser.add_argument("--test", required=True, help="WikiText-2's test split")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--start", default=str(ROOT / "configs" / "quickstart" / "teacher"), help="BERT folder")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--student-steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=32, help="of 32 rows, of each final measurement; 0 = all")
    parser.add_argument("--out", type=Path, help="file for the tables; the curves go beside it; default in --workdir")
    flags = parser.parse_args()
    splits = {"train": flags.train, "valid": flags.valid, "test": flags.test}
    text = {name: write_text(value, f"--{name}", flags.workdir / f"text/{name}.txt") for name, value in splits.items()}
    for seed in map(int, flags.seeds.split(",")):
        run_seed(flags, text, seed=seed)
    report(flags)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
