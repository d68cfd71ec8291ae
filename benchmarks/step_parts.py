"""Where the time of jaxdistill's float32 step on a CPU goes: by model, and by kind of work.

    taskset -c 0 python benchmarks/step_parts.py [--tokens all] [--steps 5]

The step is that of benchmarks/step.py. On a single core the operations run one after the other, so that their times,
which JAX's profiler measures, add up to the step. The compiler's text says which model an operation is of; one into
which XLA has merged several counts as what the compiler names it by.
"""

import argparse
import collections
import gzip
import json
import os
import re
import tempfile
from pathlib import Path

import step
from rich.console import Console
from rich.table import Table

# What the name of an operation contains; the first row that fits counts.
MODELS = {
    "head, of both": r"jvp\(\)/(while|broadcast)",
    "student, backward": r"transpose\(jvp",
    "student, forward": r"jvp\(FlaxDistil",
    "teacher": r"jvp\(FlaxBert",
    "update": "",
}
KINDS = {
    "attention between tokens": r"vmap\(|/attention/(self/)?reshape",
    "products with parameters": r"dot_general$|/while/.*/reduce_max$",  # teacher's logits, merged with their maximum
    "GELU": r"/(ffn|intermediate)/\w+$",
    "rest": "",
}


def kind_of(names: dict[str, str], name: str) -> str:
    return next(kind for kind, pattern in names.items() if re.search(pattern, name))


def operations(hlo: str) -> dict[str, str]:
    """The operations of a compiled program that run by themselves, and the names that JAX gave them."""
    found = re.findall(r'^\s*(?:ROOT )?%([\w.-]+) = (?:(?!op_name).)*op_name="([^"]*)"', hlo, re.MULTILINE)
    # The gradient of a kernel ends in a transposition by name. A loop's time is that of its operations.
    return {op: f"{name}/dot_general" if op.startswith("dot") else name for op, name in found if "while" not in op}


def traced(folder: Path) -> list[tuple[str, float]]:
    """Every operation that a trace holds, and its milliseconds."""
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [(event["name"], event["dur"] / 1e3) for event in events if event.get("ph") == "X"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step.add_sizes(parser)
    parser.add_argument("--tokens", choices=["all", "masked"], default="all")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) > 1:
        parser.error("on several cores the times of operations overlap; put taskset -c 0 before the command")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dump = f"--xla_dump_to={folder / 'hlo'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dump}"}
        import jax

        step.make_folders(args, folder)
        config = step.make_config(args, folder, args.tokens)
        batch = step.make_batch(config, vocab=args.vocab, seed=0)
        steps = step.jaxdistill(step.Job(config, folder, [batch], "cpu"), half=False)
        for _ in range(3):  # loads, compiles, warms up
            next(steps)
        with jax.profiler.trace(str(folder / "trace")):
            for _ in range(args.steps):
                next(steps)
        (hlo,) = (folder / "hlo").glob("*jit_step.cpu_after_optimizations.txt")
        names, times = operations(hlo.read_text()), traced(folder / "trace")
    spent: collections.Counter[tuple[str, str]] = collections.Counter()
    for op, milliseconds in times:
        if op in names:
            spent[kind_of(MODELS, names[op]), kind_of(KINDS, names[op])] += milliseconds / args.steps
    total = sum(spent.values())
    table = Table("ms of a step", *KINDS, "sum", "share", title=f"{args.tokens}: {total:,.0f} ms")
    for model in MODELS:
        row = [spent[model, kind] for kind in KINDS]
        table.add_row(model, *(f"{x:,.0f}" for x in row), f"{sum(row):,.0f}", f"{sum(row) / total:.0%}")
    Console(width=140).print(step.machine(), table)


if __name__ == "__main__":
    main()
