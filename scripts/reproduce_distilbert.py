"""What is each part of the DistilBERT recipe worth? The ablation of the paper, on a teacher of half the size.

    python scripts/reproduce_distilbert.py --teacher minilm-l6-mlm --train 'wikipedia/*.txt,europarl.txt.gz' \
        --valid wiki.valid.tokens --test wiki.test.tokens --workdir runs/distilbert --out docs/results.md

Sanh et al. 2019 (arXiv:1910.01108), table 4, take one part away at a time and give the change of the GLUE score:
without the divergence to the teacher -2.96, without the cosine of hidden states -1.46, without masked language
modelling -0.31, and from random weights -3.69. The same arms here, and some more, are measured by what the models were
trained for: loss and accuracy on the masked words of WikiText-2. Every arm has the same text, masks, number of updates
and settings of configs/bert_mlm.py; the evaluation draws the masked words uniformly.

Methods that are no part of that recipe have arms as well, and a table of their own beside the full recipe:

    python scripts/reproduce_distilbert.py ... --section distilbert-methods --arms 'full recipe;uniform masks;...'

Resumable: the same command goes on. Seeds and arms may run side by side in several processes (--seeds, --arms); the
report is of all seeds of which the arms are complete. `--full` is for one accelerator: BERT-base into 6 layers, 1.6
billion tokens an arm, which docs/times.md reckons at five hours of one H200.

pip install 'jaxdistill[report]' for the plot.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import (
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

FULL = "full recipe"
NO_MLM = "without masked language modelling"
# arm -> what differs from the full recipe, which starts from layers of the teacher, spread evenly
PARTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "without the divergence": {"loss.alpha_ce": 0.0},
    "without the cosine": {"loss.alpha_cos": 0.0},
    NO_MLM: {"loss.alpha_mlm": 0.0},
    "random start": {"student.init": "random"},
    "start of the reference scripts": {"student.reference_init": True},
    "no teacher, same start": {"loss.alpha_ce": 0.0, "loss.alpha_cos": 0.0},
    "no teacher, random start": {"loss.alpha_ce": 0.0, "loss.alpha_cos": 0.0, "student.init": "random"},
}
METHODS: dict[str, dict[str, Any]] = {
    "uniform masks": {"mask.smoothing": 0.0},
    "uniform masks, without masked language modelling": {"mask.smoothing": 0.0, "loss.alpha_mlm": 0.0},
    "self-attention relations": {"loss.alpha_relation": 1.0},
    # All layers, at other widths than the teacher's, so that hidden states have no cosine.
    "narrow by importance": {"student.family": "", "loss.alpha_cos": 0.0, "student.init": "importance"},
    "narrow, random start": {"student.family": "", "loss.alpha_cos": 0.0, "student.init": "random"},
}
ARMS = PARTS | METHODS
# What --full sets, where a flag does not say otherwise.
FULL_SIZE = {
    "teacher": "bert-base-uncased",
    "student_layers": 6,
    "steps": 50_000,
    "rows": 256,
    "accumulation": 4,
    "dtype": "bfloat16",
    "batches": 0,
}
HOURS = 3.2  # of one H200, for a billion tokens of bert_mlm (docs/times.md)
PUBLISHED = {
    "without the divergence": -2.96,
    "without the cosine": -1.46,
    NO_MLM: -0.31,
    "random start": -3.69,
}
COLUMNS = {
    "loss": "mlm_loss",
    "accuracy": "mlm_accuracy",
    "share of the teacher's accuracy": "share",
    "KL to the teacher": "kl",
    "same best word": "top1",
    "pseudo-perplexity": "pseudo_perplexity",
    "loss, masks of training": "recipe_loss",
    "minutes": "minutes",
}
DIGITS = {"pseudo_perplexity": 1, "minutes": 1}
COMPARED = {
    name: key for name, key in COLUMNS.items() if key in ("mlm_loss", "mlm_accuracy", "kl", "top1", "recipe_loss")
}


def settings_of(flags: argparse.Namespace, text: dict[str, Path], arm: str, *, seed: int) -> dict[str, Any]:
    settings = {
        "seed": seed,
        "teacher.name": flags.teacher,
        "teacher.dtype": flags.dtype,
        "student.dtype": flags.dtype,
        "data.path": text["train"],
        "data.eval_path": text["valid"],
        "data.batching": "packed",
        "data.max_length": flags.length,
        "data.buckets": f"({flags.length},)",
        "train.steps": flags.steps,
        "train.batch_size": flags.rows,
        "train.accumulation": flags.accumulation,
        "loss.tokens": flags.tokens,
        "loss.relation_heads": flags.relation_heads,
        "evaluate.every": max(flags.steps // 8, 1),
        "evaluate.batches": 8,
        "evaluate.prompts": "()",
        "checkpoint.every": max(flags.steps // 2, 1),
        "checkpoint.keep": 1,
        "checkpoint.best": "",
        "log.every": max(flags.steps // 100, 1),
    }
    return settings | student_of(flags, arm) | ARMS[arm]


def student_of(flags: argparse.Namespace, arm: str) -> dict[str, Any]:
    """What a student is made from: layers of the teacher, a narrower teacher, or random weights of either size."""
    init = ARMS[arm].get("student.init", "teacher")
    if init == "importance":
        return {"student.width": flags.width, "student.inner": flags.inner, "student.heads": flags.heads}
    if init == "random" and "student.family" in ARMS[arm]:
        sizes = {"hidden_size": flags.width, "intermediate_size": flags.inner, "num_attention_heads": flags.heads}
        return {"student.overrides": sizes}
    if init == "random":
        return {"student.overrides": {"n_layers": flags.student_layers}}
    return {"student.layers": f"spread:{flags.student_layers}"}


def measure(flags: argparse.Namespace, text: dict[str, Path], workdir: Path) -> Figures:
    """The test text, masked uniformly, student and teacher alike."""

    def figures() -> Figures:
        from jaxdistill.jobs.measure import evaluate

        overrides = [
            f"--config.data.eval_path={text['test']}",
            "--config.mask.smoothing=0",
            f"--config.evaluate.batches={flags.batches}",
            f"--config.evaluate.pseudo_rows={flags.pseudo_rows}",
        ]
        metrics = ["perplexity", "agreement", "pseudo_perplexity"]
        found = evaluate(workdir, step=None, metrics=metrics, overrides=overrides, allow_pickle=False, report=print)
        minutes = json.loads((workdir / "done.json").read_text())
        return found | minutes | {"share": found["mlm_accuracy"] / found["teacher_mlm_accuracy"]}

    return measured(workdir, figures)


def run_seed(flags: argparse.Namespace, text: dict[str, Path], *, seed: int) -> None:
    for arm in arms_of(flags, ARMS):
        workdir = run("bert_mlm.py", folder_of(flags.workdir, seed, arm), settings_of(flags, text, arm, seed=seed))
        measure(flags, text, workdir)


def size_and_time(flags: argparse.Namespace) -> list[str]:
    """Parameters of teacher and student, and the time of a forward pass of one row on this machine."""
    import jax
    import jax.numpy as jnp

    import jaxdistill
    from jaxdistill.models.inputs import Inputs
    from jaxdistill.models.intercept import apply
    from jaxdistill.models.model import in_millions

    teacher = jaxdistill.load(flags.teacher)
    student = jaxdistill.cut(teacher, f"spread:{flags.student_layers}", family="distilbert")
    ids, seen = jnp.full((1, flags.length), 1000), jnp.ones((1, flags.length), bool)
    lines = []
    for name, language_model in {"teacher": teacher, "student": student}.items():
        model, params = language_model.model, jax.device_put(language_model.params)
        forward = jax.jit(lambda params, model=model: apply(model, params, Inputs(ids, seen)).logits)
        seconds = []
        for _ in range(25):
            began = time.perf_counter()
            jax.block_until_ready(forward(params))
            seconds.append(time.perf_counter() - began)
        milliseconds = 1000 * statistics.median(seconds[5:])
        lines.append(f"{name} {in_millions(params)} parameters, {milliseconds:.1f} ms")
    return lines


def figures_of(workdir: Path) -> Figures:
    """Those of the test text with masks drawn uniformly, and of the validation text with masks as in training."""
    last = records(workdir, "eval")[-1]
    own = {f"{of}recipe_loss": last[f"{of}mlm_loss"] for of in ("", "teacher_")}
    return {**result_of(workdir), **own}


def report(flags: argparse.Namespace) -> None:
    """The tables and the curves of all complete seeds."""
    arms = arms_of(flags, ARMS)
    seeds = complete_seeds(flags.workdir, arms)
    if not seeds:
        return
    folders = {arm: [folder_of(flags.workdir, seed, arm) for seed in seeds] for arm in arms}
    results = {arm: [figures_of(workdir) for workdir in of] for arm, of in folders.items()}
    # The teacher is measured with every arm, with the same masks: once is enough.
    first = next(iter(results.values()))[0]
    teacher = {name.removeprefix("teacher_"): value for name, value in first.items() if name.startswith("teacher_")}
    said = [
        f"A forward pass of 1 x {flags.length} tokens in float32: {'; '.join(size_and_time(flags))}.",
        "\n".join(table("arm", {"teacher": [teacher], **results}, COLUMNS, DIGITS)),
    ]
    if FULL in arms:
        others = {arm: runs for arm, runs in results.items() if arm != FULL}
        said.append("\n".join(paired_table(f"difference to the {FULL}", others, results[FULL], COMPARED)))
        if all(arm in arms for arm in PUBLISHED):
            said.append("\n".join(order(results)))
    out = write_report(flags, seeds, said)
    draw(folders, out.with_name(f"{flags.section}.png"))


def order(results: Mapping[str, Sequence[Figures]]) -> list[str]:
    """The published ablation beside this one, the arm that loses most first."""
    lost = {arm: paired_mean(results, arm, "mlm_accuracy") for arm in PUBLISHED}
    lines = ["| arm | published, GLUE score | here, points of accuracy |", "|---|---|---|"]
    for arm in sorted(PUBLISHED, key=lambda arm: PUBLISHED[arm]):
        lines.append(f"| {arm} | {PUBLISHED[arm]:+.2f} | {100 * lost[arm]:+.2f} |")
    return lines


def paired_mean(results: Mapping[str, Sequence[Figures]], arm: str, key: str) -> float:
    pairs = zip(results[arm], results[FULL], strict=True)
    return statistics.mean(run[key] - full[key] for run, full in pairs)


def draw(folders: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Held-out loss over updates, mean and range over seeds, of every arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.4), constrained_layout=True)
    for arm, of_seeds in folders.items():
        found = [records(workdir, "eval") for workdir in of_seeds]
        curves = [[(record["step"], record["mlm_loss"]) for record in one if record["step"]] for one in found]
        draw_band(axes, curves, arm, linestyle="--" if "random" in arm else "-")
    axes.set(
        xlabel="updates",
        ylabel="held-out masked-LM loss, masks of training, nats",
        title="Held-out loss of every arm",
    )
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)  # where no number of arms hides a curve
    save_figure(figure, path)


def flags_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The ablation of DistilBERT, over several seeds.")
    parser.add_argument(
        "--full", action="store_true", help="BERT-base and 1.6 billion tokens an arm, where flags do not say otherwise"
    )
    parser.add_argument("--teacher", default="bert-base-uncased", help="folder or hub name of a BERT")
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--train", required=True, help="text files or quoted globs, separated by commas")
    parser.add_argument("--valid", required=True, help="held-out text for the curves")
    parser.add_argument("--test", required=True, help="held-out text for the tables")
    add_flags(parser, section="distilbert", arms=PARTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tokens", default="all", choices=["all", "masked"], help="of the divergence")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--relation-heads", type=int, default=48, help="of the arm with relations")
    parser.add_argument("--width", type=int, default=256, help="channels of the narrow students")
    parser.add_argument("--inner", type=int, default=1024, help="units of each of their MLPs")
    parser.add_argument("--heads", type=int, default=8, help="heads of each of their layers")
    parser.add_argument("--batches", type=int, default=32, help="of 32 rows, of the final measurement; 0 = all")
    parser.add_argument("--pseudo-rows", type=int, default=16)
    parser.add_argument("--report-only", action="store_true", help="run nothing; write the tables of what is complete")
    if parser.parse_args(argv).full:
        parser.set_defaults(**FULL_SIZE)
    return parser.parse_args(argv)


def size_of(flags: argparse.Namespace) -> str:
    """How much there is to train, and how long it takes on one accelerator, as reckoned."""
    runs = len(arms_of(flags, ARMS)) * len(seeds_of(flags))
    tokens = flags.steps * flags.rows * flags.length
    return f"{runs} runs of {tokens / 1e9:.1f} billion tokens, some {runs * HOURS * tokens / 1e9:.0f} hours of one H200"


def main() -> None:
    flags = flags_of()
    arms_of(flags, ARMS)
    if flags.full:
        print(size_of(flags))
    if flags.report_only:
        return report(flags)
    splits = {"train": flags.train, "valid": flags.valid, "test": flags.test}
    text = {name: write_text(value, f"--{name}", flags.workdir / f"text/{name}.txt") for name, value in splits.items()}
    for seed in seeds_of(flags):
        run_seed(flags, text, seed=seed)
    report(flags)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
