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
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RATES = (0.0, 0.1, 0.2)
# (what the student starts from, its teacher's rate): a rate, or None for random weights.
Arm = tuple[float | None, float]
ARMS: tuple[Arm, ...] = ((0.0, 0.0), (0.1, 0.1), (0.2, 0.2), (0.1, 0.0), (0.2, 0.0), (None, 0.0))
BASELINE = (0.0, 0.0)
BEGIN, END = "<!-- layerdrop -->", "<!-- /layerdrop -->"  # what stands between them in --out is written anew
KEPT = "every_other"


def write_text(train: str, valid: Path, test: Path, folder: Path) -> dict[str, Path]:
    """WikiText's tokenisation undone where it is an escape (` @-@ `, <unk>), so that one tokenizer reads both texts."""
    from jaxdistill import files

    def clean(text: str) -> str:
        for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "[UNK]")):
            text = text.replace(old, new)
        return text

    sources = {"train": sorted(map(Path, glob.glob(train))), "valid": [valid], "test": [test]}
    written = {}
    for name, paths in sources.items():
        if not paths or not all(path.is_file() for path in paths):
            sys.exit(f"error: --{name} names no file; give the text to use")
        written[name] = folder / f"{name}.txt"
        files.write_text(written[name], "".join(clean(path.read_text(encoding="utf-8")) for path in paths))
    return written


def run(recipe: str, workdir: Path, settings: dict[str, Any]) -> Path:
    """A run of the ordinary trainer; one that is complete costs the reading of its metrics."""
    from jaxdistill import recipe as recipes
    from jaxdistill.run import loop

    done = workdir / "done"
    if not done.exists():
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        loop.run(recipes.read(str(ROOT / "configs" / recipe), overrides), workdir)
        done.touch()
    return workdir


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


def measure(flags: argparse.Namespace, text: dict[str, Path], workdir: Path) -> dict[str, float]:
    """Validation and test text, and training loss over the last tenth and on average."""
    from jaxdistill.run.measure import evaluate

    result = workdir / "result.json"
    if not result.exists():
        found = {}
        for split in ("valid", "test"):
            overrides = [f"--config.data.eval_path={text[split]}", f"--config.evaluate.batches={flags.batches}"]
            figures = evaluate(workdir, step=None, metrics=None, overrides=overrides, allow_pickle=False, report=print)
            found |= {f"{split}/{name}": value for name, value in figures.items()}
        losses = [record["loss"] for record in records(workdir, "train")]
        last = losses[-max(len(losses) // 10, 1) :]
        found |= {"train/last": sum(last) / len(last), "train/average": sum(losses) / len(losses)}
        from jaxdistill import files

        files.write_text(result, json.dumps(found, indent=2))
    return json.loads(result.read_text())


def records(workdir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


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
    from jaxdistill import files

    seeds = sorted(int(path.parent.name.removeprefix("seed")) for path in flags.workdir.glob("seed*/complete"))
    if len(seeds) < 2:
        print(f"{len(seeds)} complete seed(s); a paired test takes two, and the report waits for them")
        return
    runs = [folders(flags.workdir, seed) for seed in seeds]
    results = {key: [json.loads((run[key] / "result.json").read_text()) for run in runs] for key in runs[0]}
    out = flags.out or flags.workdir / "results.md"
    tables = [teacher_table(results), student_table(results), paired_table(results)]
    told = "\n\n".join("\n".join(lines) for lines in [[f"Seeds {', '.join(map(str, seeds))}."], *tables])
    written = out.read_text(encoding="utf-8") if out.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = written.partition(BEGIN)
    files.write_text(out, f"{before}{BEGIN}\n\n{told}\n\n{END}{rest.partition(END)[2]}")
    curves = out.with_name("layerdrop.png")
    draw(runs, curves)
    print(f"{told}\n\n{out} has these tables of {len(seeds)} seeds, {curves} the curves")


def spread(values: Sequence[float]) -> str:
    import numpy as np

    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def teacher_table(results: dict[Any, list[dict[str, float]]]) -> list[str]:
    columns = {
        "train loss": "train/last",
        "validation": "valid/mlm_loss",
        "test": "test/mlm_loss",
        "cut, validation": f"valid/mlm_loss/{KEPT}",
        "cut, test": f"test/mlm_loss/{KEPT}",
    }
    rows = {f"teacher, rate {rate:g}": results[rate] for rate in RATES}
    return table("", rows, columns)


STUDENT_COLUMNS = {
    "last loss": "train/last",
    "average loss": "train/average",
    "validation": "valid/mlm_loss",
    "test": "test/mlm_loss",
    "KL to its teacher, test": "test/kl",
    "same best word, test": "test/top1",
}


def student_table(results: dict[Any, list[dict[str, float]]]) -> list[str]:
    return table("student: start, teacher", {name_of(arm): results[arm] for arm in ARMS}, STUDENT_COLUMNS)


def table(title: str, rows: dict[str, list[dict[str, float]]], columns: dict[str, str]) -> list[str]:
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, found in rows.items():
        lines.append(
            f"| {name} | " + " | ".join(spread([one[key] for one in found]) for key in columns.values()) + " |"
        )
    return lines


def paired_table(results: dict[Any, list[dict[str, float]]]) -> list[str]:
    """Difference to the baseline arm, seed by seed: mean, 95 % interval and p of Student's paired t-test."""
    from scipy import stats

    lines = ["| difference to the first student | " + " | ".join(STUDENT_COLUMNS) + " |"]
    lines.append("|---|" + "---|" * len(STUDENT_COLUMNS))
    for arm in ARMS:
        if arm == BASELINE:
            continue
        cells = []
        for key in STUDENT_COLUMNS.values():
            test = stats.ttest_rel([one[key] for one in results[arm]], [one[key] for one in results[BASELINE]])
            interval = test.confidence_interval()
            middle = (interval.low + interval.high) / 2
            cells.append(f"{middle:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], p {test.pvalue:.2g}")
        lines.append(f"| {name_of(arm)} | " + " | ".join(cells) + " |")
    return lines


def draw(runs: Sequence[dict[Any, Path]], path: Path) -> None:
    """Held-out loss over updates, mean and range over seeds: teachers whole and cut, students."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)

    def curve(axes: Any, key: Any, figure: str, label: str, **style: Any) -> None:
        evaluations = [records(run[key], "eval") for run in runs]
        steps = [record["step"] for record in evaluations[0]]
        losses = np.array([[record[figure] for record in one] for one in evaluations])
        (line,) = axes.plot(steps, losses.mean(axis=0), label=label, **style)
        axes.fill_between(
            steps, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.15, linewidth=0
        )

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
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="LayerDrop teachers, pruned and distilled, over several seeds.")
    parser.add_argument("--train", required=True, help="text file or quoted glob; WikiText-2's training split fits")
    parser.add_argument("--valid", required=True, type=Path, help="WikiText-2's validation split")
    parser.add_argument("--test", required=True, type=Path, help="WikiText-2's test split")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--start", default=str(ROOT / "configs" / "quickstart" / "teacher"), help="BERT folder")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--student-steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=32, help="of 32 rows, of each final measurement; 0 = all")
    parser.add_argument("--out", type=Path, help="file for the tables; the curves go beside it; default in --workdir")
    flags = parser.parse_args()
    text = write_text(flags.train, flags.valid, flags.test, flags.workdir / "text")
    for seed in map(int, flags.seeds.split(",")):
        run_seed(flags, text, seed=seed)
    report(flags)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
