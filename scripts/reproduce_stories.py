"""Which divergence makes the best small story-teller, when every objective has the same time?

    python scripts/reproduce_stories.py --teacher stories260k-llama --stories tinystories_1000.json \
        --workdir runs/stories --seconds 60 --out docs/results.md

A Llama with real weights is cut to some of its layers, and the student learns by each objective from the same stories.
An update by samples costs several times one by cross entropy, so a comparison by updates favours the dear objectives:
here each has as many updates as fit into --seconds, by the time of its own updates in a short run of the same shape.
These times are measured once, for all seeds. On a CPU the seconds are those of the processor, all threads together, so
that other work on the machine does not count; on an accelerator they are those of a clock.

Besides perplexity and the agreement with the teacher, students are measured by a figure that none of them was trained
for: they continue the beginnings of held-out stories, greedily and by sampling, and the teacher says how probable the
continuations are. A text that repeats itself is probable too, so the share of repeated 4-grams stands beside it.

The stories are a JSON list of texts; the last fifth is held out. Resumable: the same command goes on. Seeds may run
side by side in several processes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
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
)

# objective -> (recipe, what differs from it)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cross entropy alone": ("gpt2_kd.py", {"loss.alpha_ce": 0.0, "loss.alpha_clm": 1.0}),
    "forward KL": ("gpt2_kd.py:forward_kl", {}),
    "reverse KL": ("gpt2_kd.py:reverse_kl", {}),
    "Jensen-Shannon": ("gpt2_kd.py:jsd", {}),
    "skewed KL": ("gpt2_kd.py:skewed_kl", {}),
    "on policy (GKD)": ("gpt2_kd.py:on_policy", {}),
    "policy gradient (MiniLLM)": ("gpt2_policy.py", {}),
}
FIRST = "forward KL"
COLUMNS = {
    "ms an update": "milliseconds",
    "updates": "updates",
    "perplexity": "perplexity",
    "KL to the teacher": "kl",
    "same best word": "top1",
    "greedy: teacher's perplexity": "greedy_perplexity",
    "repeated": "greedy_repeated",
    "sampled: teacher's perplexity": "sampled_perplexity",
    "repeated ": "sampled_repeated",
}
DIGITS = {"milliseconds": 0, "updates": 0, "perplexity": 2, "greedy_perplexity": 2, "sampled_perplexity": 2}
COMPARED = {name: COLUMNS[name] for name in ("perplexity", "KL to the teacher", "sampled: teacher's perplexity")}


def write_stories(flags: argparse.Namespace) -> dict[str, Path]:
    """{train, test: a file with a story in every JSON line}; the last fifth is for testing."""
    from jaxdistill import files

    stories = json.loads(flags.stories.read_text(encoding="utf-8"))
    held_out = len(stories) // 5
    written = {}
    for name, part in {"train": stories[:-held_out], "test": stories[-held_out:]}.items():
        written[name] = flags.workdir / f"text/{name}.jsonl"
        lines = "".join(json.dumps({"text": story}) + "\n" for story in part)
        if not written[name].exists() or written[name].read_text() != lines:
            files.write_text(written[name], lines)
    return written


def settings_of(flags: argparse.Namespace, text: dict[str, Path], *, seed: int, steps: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "teacher.name": flags.teacher,
        "student.name": "",
        "student.layers": f"spread:{flags.student_layers}",
        "data.source": "jsonl",
        "data.path": text["train"],
        "data.eval_path": text["test"],
        "data.prompt_column": "",
        "data.column": "text",
        "data.max_length": flags.length,
        "data.buckets": f"({flags.length},)",
        "train.steps": steps,
        "train.batch_size": flags.rows,
        "train.accumulation": 1,
        "optim.learning_rate": flags.learning_rate,
        "sample.prompt_tokens": flags.prompt_tokens,
        "sample.max_new_tokens": flags.new_tokens,
        "evaluate.metrics": "('perplexity', 'agreement')",
        "evaluate.batches": 4,
        "evaluate.every": steps,
        "evaluate.prompts": "()",
        "checkpoint.every": steps,
        "checkpoint.best": "",
        "log.every": max(steps // 50, 1),
        "export.to": "()",
    }


def seconds_of_updates(flags: argparse.Namespace, text: dict[str, Path]) -> dict[str, float]:
    """How long an update of each objective takes in a short run, measured once for all seeds, and then read."""
    from jaxdistill import files

    path = flags.workdir / "times.json"
    times: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    for name in arms_of(flags, METHODS):
        if name not in times:
            times[name] = seconds_of_update(flags, text, name)
            files.write_text(path, json.dumps(times, indent=2))
    return times


def seconds_of_update(flags: argparse.Namespace, text: dict[str, Path], name: str) -> float:
    import jax

    from jaxdistill.run.hooks import Hooks

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    ticks: list[float] = []

    def tick(step: int, kind: str, figures: Figures) -> None:
        if kind == "train":
            ticks.append(clock())

    recipe, changes = METHODS[name]
    settings = settings_of(flags, text, seed=0, steps=flags.probed) | changes | {"log.every": 1}
    with tempfile.TemporaryDirectory() as folder:
        run(recipe, Path(folder) / "run", settings, Hooks(on_record=tick))
    return after_compilation(ticks)


def after_compilation(ticks: Sequence[float]) -> float:
    """The time of an update in the second half, as a mean: on policy, updates with samples take longer than others."""
    half = len(ticks) // 2
    return (ticks[-1] - ticks[half]) / (len(ticks) - 1 - half)


def continued(flags: argparse.Namespace, text: dict[str, Path], student: Any, *, temperature: float) -> Figures:
    """The teacher's perplexity of the student's continuations of held-out beginnings, and how much they repeat."""
    import jaxdistill

    stories = [json.loads(line)["text"] for line in text["test"].read_text().splitlines()[: flags.continued]]
    beginnings = [" ".join(story.split(" ")[: flags.prompt_words]) for story in stories]
    found = jaxdistill.generate(
        student, beginnings, max_new_tokens=flags.new_tokens, temperature=temperature, batch_size=16
    )
    pairs = [(one.prompt, one.completion) for one in found if one.completion.strip()]
    figures = jaxdistill.evaluate(
        flags.teacher,
        pairs,
        metrics=["perplexity"],
        settings={"data.template": "{prompt}{completion}", "evaluate.batches": 0, "data.max_length": flags.length},
    )
    return {"perplexity": figures["perplexity"], "repeated": statistics.mean(repeated(rest) for _, rest in pairs)}


def repeated(text: str) -> float:
    """The share of 4-grams of words that stood in the text before."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure(flags: argparse.Namespace, text: dict[str, Path], workdir: Path, known: dict[str, float]) -> Figures:
    def figures() -> Figures:
        import jaxdistill

        student = jaxdistill.load(str(workdir))
        found = jaxdistill.evaluate(student, settings={"evaluate.batches": 0}) | known
        for name, temperature in {"greedy": 0.0, "sampled": 1.0}.items():
            of_text = continued(flags, text, student, temperature=temperature)
            found |= {f"{name}_{key}": value for key, value in of_text.items()}
        return found

    return measured(workdir, figures)


def run_seed(flags: argparse.Namespace, text: dict[str, Path], times: dict[str, float], *, seed: int) -> None:
    for name in arms_of(flags, METHODS):
        recipe, changes = METHODS[name]
        steps = max(int(flags.seconds / times[name]), 1) if flags.seconds else flags.steps
        settings = settings_of(flags, text, seed=seed, steps=steps) | changes
        known = {"updates": steps} | ({"milliseconds": 1000 * times[name]} if flags.seconds else {})
        measure(flags, text, run(recipe, folder_of(flags.workdir, seed, name), settings), known)


def report(flags: argparse.Namespace, text: dict[str, Path]) -> None:
    """The tables of all complete seeds."""
    arms = arms_of(flags, METHODS)
    seeds = complete_seeds(flags.workdir, arms)
    if not seeds:
        return
    results = {name: [result_of(folder_of(flags.workdir, seed, name)) for seed in seeds] for name in arms}
    rows = {"teacher": [of_teacher(flags, text, next(iter(results.values()))[0])], **results}
    said = [
        f"Every objective has {flags.seconds:g} seconds." if flags.seconds else f"{flags.steps} updates each.",
        "\n".join(table("objective", rows, COLUMNS, DIGITS)),
    ]
    if FIRST in results:
        others = {name: runs for name, runs in results.items() if name != FIRST}
        said.append("\n".join(paired_table(f"difference to {FIRST}", others, results[FIRST], COMPARED)))
    write_report(flags, seeds, said)


def of_teacher(flags: argparse.Namespace, text: dict[str, Path], of_student: Figures) -> Figures:
    """The teacher's own figures, among them the perplexity of what it writes itself."""

    def figures() -> Figures:
        found = {"perplexity": of_student["teacher_perplexity"]}
        for name, temperature in {"greedy": 0.0, "sampled": 1.0}.items():
            of_text = continued(flags, text, flags.teacher, temperature=temperature)
            found |= {f"{name}_{key}": value for key, value in of_text.items()}
        return found

    return measured(flags.workdir / "teacher", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="A story-teller distilled by each objective, over several seeds.")
    parser.add_argument("--teacher", required=True, help="folder or hub name of a causal model")
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    add_flags(parser, section="stories", arms=METHODS)
    parser.add_argument("--seconds", type=float, default=60, help="of training for each objective; 0 = --steps each")
    parser.add_argument("--probed", type=int, default=32, help="updates of the short run that times an objective")
    parser.add_argument("--steps", type=int, default=300, help="updates of each objective, with --seconds 0")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt-words", type=int, default=12, help="words of a story that are its beginning")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of a row, that students continue in training")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--continued", type=int, default=64, help="held-out beginnings that students continue")
    flags = parser.parse_args()
    arms_of(flags, METHODS)
    text = write_stories(flags)
    times = seconds_of_updates(flags, text) if flags.seconds else {}
    for seed in seeds_of(flags):
        run_seed(flags, text, times, seed=seed)
    report(flags, text)


if __name__ == "__main__":
    from jaxdistill.train import guarded

    sys.exit(guarded(main))
