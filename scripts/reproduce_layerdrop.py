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

Whether the head start of a LayerDrop student lasts is a question of three arms and a longer distillation:

    python scripts/reproduce_layerdrop.py ... --student-steps 800 --seeds 0,1,2 --section layerdrop-long --arms \
        'rate 0 taught by rate 0;rate 0.2 taught by rate 0.2;rate 0.2 taught by rate 0'
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
    add_flags,
    arms_of,
    complete_seeds,
    draw_band,
    folder_of,
    measured,
    paired_table,
    records,
    result_of,
    run,
    save_figure,
    seeds_of,
    table,
    write_report,
    write_text,
)

RATES = (0.0, 0.1, 0.2)
# The rate of what the student starts from, None for random weights; and its teacher's rate.
Arm = tuple[float | None, float]
BASELINE = "rate 0 taught by rate 0"
ARMS: dict[str, Arm] = {
    BASELINE: (0.0, 0.0),
    "rate 0.1 taught by rate 0.1": (0.1, 0.1),
    "rate 0.2 taught by rate 0.2": (0.2, 0.2),
    "rate 0.1 taught by rate 0": (0.1, 0.0),
    "rate 0.2 taught by rate 0": (0.2, 0.0),
    "random weights taught by rate 0": (None, 0.0),
}
KEPT = "every_other"


def rates_of(arms: Sequence[str]) -> list[float]:
    """The teachers that arms start from or learn from."""
    return [rate for rate in RATES if any(rate in ARMS[arm] for arm in arms)]


def name_of(rate: float) -> str:
    return f"teacher, rate {rate:g}"


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
    return run("bert_layerdrop_teacher.py", folder_of(flags.workdir, seed, name_of(rate)), settings)


def student(
    flags: argparse.Namespace, text: dict[str, Path], *, seed: int, arm: str, teachers: dict[float, Path]
) -> Path:
    from jaxdistill.jobs.cut import Cut, init_student

    start, taught = ARMS[arm][0], teachers[ARMS[arm][1]]
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
    return run("bert_mlm.py", folder_of(flags.workdir, seed, arm), settings)


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
        from jaxdistill.jobs.measure import evaluate

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
    arms = arms_of(flags, ARMS)
    teachers = {rate: teacher(flags, text, seed=seed, rate=rate) for rate in rates_of(arms)}
    for workdir in teachers.values():
        measure(flags, text, workdir)
    for arm in arms:
        measure(flags, text, student(flags, text, seed=seed, arm=arm, teachers=teachers))


def report(flags: argparse.Namespace) -> None:
    """The tables and the curves of all complete seeds."""
    arms = arms_of(flags, ARMS)
    teachers = [name_of(rate) for rate in rates_of(arms)]
    seeds = complete_seeds(flags.workdir, [*teachers, *arms])
    if not seeds:
        return
    folders = {name: [folder_of(flags.workdir, seed, name) for seed in seeds] for name in (*teachers, *arms)}
    results = {name: [result_of(workdir) for workdir in of] for name, of in folders.items()}
    others = {arm: results[arm] for arm in arms if arm != BASELINE}
    tables = [
        table("", {name: results[name] for name in teachers}, TEACHER_COLUMNS),
        table("student", {arm: results[arm] for arm in arms}, STUDENT_COLUMNS),
        paired_table(f"difference to {BASELINE}", others, results[BASELINE], STUDENT_COLUMNS),
        head_start({arm: folders[arm] for arm in arms}),
    ]
    out = write_report(flags, seeds, ["\n".join(lines) for lines in tables])
    draw(folders, out.with_name(f"{flags.section}.png"))


def head_start(folders: dict[str, list[Path]]) -> list[str]:
    """How far each arm is ahead of the first by its held-out loss, after so many updates."""

    def losses(arm: str) -> list[Figures]:
        of_seeds = [records(workdir, "eval") for workdir in folders[arm]]
        return [{str(record["step"]): record["mlm_loss"] for record in of_seed} for of_seed in of_seeds]

    first, rows = losses(BASELINE), {}
    for arm in folders:
        if arm != BASELINE:
            pairs = zip(losses(arm), first, strict=True)
            rows[arm] = [{step: mine[step] - theirs[step] for step in theirs} for mine, theirs in pairs]
    return table("validation loss less that of the first, after updates", rows, {step: step for step in first[0]})


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


def draw(folders: dict[str, list[Path]], path: Path) -> None:
    """Held-out loss over updates, mean and range over seeds: teachers whole and cut, students."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)

    def curve(axes: Any, name: str, figure: str, label: str, **style: Any) -> None:
        curves = [[(record["step"], record[figure]) for record in records(run, "eval")] for run in folders[name]]
        draw_band(axes, curves, label, **style)

    for i, rate in enumerate(RATES):
        if name_of(rate) in folders:
            curve(left, name_of(rate), "mlm_loss", f"rate {rate:g}", color=f"C{i}")
            curve(left, name_of(rate), f"mlm_loss/{KEPT}", f"rate {rate:g}, cut", color=f"C{i}", linestyle="--")
    for arm in (name for name in ARMS if name in folders):
        start, taught = ARMS[arm]
        label = "random" if start is None else f"cut of {start:g}"
        style = "-" if start == taught else "--"
        color = f"C{RATES.index(start)}" if start is not None else "0.5"
        curve(right, arm, "mlm_loss", f"{label}, teacher {taught:g}", linestyle=style, color=color)
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
    add_flags(parser, section="layerdrop", arms=ARMS)
    parser.add_argument("--start", default=str(ROOT / "configs" / "quickstart" / "teacher"), help="BERT folder")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--student-steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=32, help="of 32 rows, of each final measurement; 0 = all")
    flags = parser.parse_args()
    arms_of(flags, ARMS)
    splits = {"train": flags.train, "valid": flags.valid, "test": flags.test}
    text = {name: write_text(value, f"--{name}", flags.workdir / f"text/{name}.txt") for name, value in splits.items()}
    for seed in seeds_of(flags):
        run_seed(flags, text, seed=seed)
    report(flags)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
