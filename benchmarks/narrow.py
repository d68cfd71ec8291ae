"""What a narrower student is worth before and after a few steps: cut by importance, by random rows, or drawn at random.

    python benchmarks/narrow.py --teacher DIR --text train.txt --held-out test.txt --width 192 --inner 768

The three students have the same sizes and are distilled alike. Random rows are cut as consistently as important ones.
Prints a Markdown table of held-out loss and of the KL divergence from the teacher (both in nats a masked token): mean
and standard deviation over seeds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxdistill
from jaxdistill.console import say
from jaxdistill.jobs.cut import Cut, importance_of, write_cut
from jaxdistill.models import hub, stored, weights
from jaxdistill.models.model import Model, build_model
from jaxdistill.models.narrow import Scores, Sizes, resolve_sizes
from jaxdistill.models.tokenizer import load_tokenizer
from jaxdistill.run.importance import narrowed

COLUMNS = "loss at the start | KL at the start | loss after {steps} steps | KL after {steps} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--inner", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", default="0", help="of random rows and numbers, data order and dropout: 0,1,2")
    flags = parser.parse_args()
    folder = Path(flags.teacher)
    model = build_model(hub.load_config(folder))
    params = stored.on_host(weights.open_params(folder, model, allow_pickle=False))
    tokenizer = load_tokenizer(folder)
    sizes = resolve_sizes(model, width=flags.width, inner=flags.inner)
    scores = importance_of(model, params, tokenizer, flags.text, say)
    rows: dict[str, list[list[float]]] = {}
    for seed in map(int, flags.seeds.split(",")):
        for name, by in (("importance", scores), ("random rows", shuffled(scores, seed)), ("random", None)):
            with tempfile.TemporaryDirectory() as scratch:
                start = Path(scratch) / "start"
                if by is not None:
                    write(model, params, tokenizer, by, sizes, start, teacher=flags.teacher)
                found = figures(flags, sizes, start if by is not None else None, Path(scratch) / "run", seed=seed)
            rows.setdefault(name, []).append(found)
            say(f"seed {seed}, {name}: {', '.join(f'{x:.3f}' for x in found)}")
    print(f"| student of width {sizes.width} | {COLUMNS.format(steps=flags.steps)} |\n|---|---|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(mean_and_spread(values) for values in zip(*found, strict=True))} |")


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def shuffled(scores: Scores, seed: int) -> Scores:
    """Scores that say nothing of the model."""
    rng = np.random.default_rng(seed)
    by_layer = ({path: rng.permutation(x) for path, x in one.items()} for one in (scores.inner, scores.heads))
    inner, heads = by_layer
    return Scores(rng.permutation(scores.channels), inner, heads, scores.energies)


def write(model: Model, params: Any, tokenizer: Any, scores: Scores, sizes: Sizes, out: Path, *, teacher: str) -> None:
    made, cut = narrowed(model, params, scores, sizes)
    layers = tuple(range(model.num_layers))
    write_cut(Cut(teacher, ",".join(map(str, layers))), made, cut, tokenizer, layers, out)


def figures(flags: argparse.Namespace, sizes: Sizes, start: Path | None, run: Path, *, seed: int) -> list[float]:
    """Figures of the run that begins with the student in `start`, or with random numbers, in the order of COLUMNS."""
    fields = {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_attention_heads": sizes.heads,
    }
    student = {"student.name": str(start)} if start else {"student.init": "random", "student.overrides": fields}
    settings = {
        **student,
        "student.family": "",
        "teacher.name": flags.teacher,
        "data.path": flags.text,
        "data.eval_path": flags.held_out,
        "data.max_length": 64,
        "loss.tokens": "masked",
        "loss.alpha_cos": 0.0,
        "train.batch_size": 32,
        "train.accumulation": 1,
        "train.steps": flags.steps,
        "evaluate.every": flags.steps,
        "evaluate.batches": 8,
        "evaluate.prompts": (),
        "optim.learning_rate": flags.rate,
        "export.to": (),
        "seed": seed,
    }
    metrics = jaxdistill.distil(workdir=run, config="bert_mlm", settings=settings).metrics
    before, *_, after = [record for record in metrics if record["kind"] == "eval"]
    return [record[name] for record in (before, after) for name in ("mlm_loss", "kl")]


if __name__ == "__main__":
    main()
