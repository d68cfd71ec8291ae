"""A step with its teacher, and with the teacher's answers from a cache: bytes, time, memory and arithmetic.

    python benchmarks/cache.py [--config configs/cached_mlm.py:smoke] [--rounds 9] [--config.KEY=VALUE ...]

For each kind of cache one is made of the recipe's text, in a temporary folder; its files' bytes are said, and the
seconds that it took. Then the steps are compiled and run in turn within each round, on the same rows and masks. Memory
and arithmetic are XLA's counts for the compiled step: exact, and the same on every run. Times are medians, in brackets
the quartiles. The student is drawn at random, as a cache is no source for a cut one.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxdistill import recipe
from jaxdistill.config import Config
from jaxdistill.console import say
from jaxdistill.jobs.cache import Made, make_cache
from jaxdistill.run.assemble import assemble
from jaxdistill.step import sharding

KINDS: dict[str, dict[str, Any]] = {
    "sampled, 12": {"kind": "sampled", "samples": 12},
    "topk, 64": {"kind": "topk", "k": 64},
    "topk+sampled, 8 and 12": {"kind": "topk+sampled", "k": 8, "samples": 12},
}


class Way(NamedTuple):
    """A step that is ready to run."""

    compiled: Any
    arguments: list[Any]  # state, teacher's parameters, batch, key
    made: Made | None
    seconds: float  # that making the cache took
    times: list[float]


def way_of(config: Config, folder: Path, made: Made | None, seconds: float) -> Way:
    parts = assemble(config, folder / "run", allow_pickle=False)
    state = parts.training.init(parts.pair.student_params)
    teacher = jax.device_put(parts.pair.teacher_params, parts.training.teacher_shardings)
    batch = sharding.put_batch(next(parts.batches), parts.meshes.student)
    arguments = [state, teacher, batch, jax.random.key(0)]
    step: Any = parts.training.step
    return Way(step.lower(*arguments).compile(), arguments, made, seconds, [])


def run_once(way: Way) -> None:
    began = time.perf_counter()
    way.arguments[0], metrics = way.compiled(*way.arguments)
    jax.block_until_ready(metrics)
    way.times.append(time.perf_counter() - began)


def row(name: str, way: Way, live: Way) -> list[str]:
    low, middle, high = (1e3 * x for x in np.percentile(way.times[1:], [25, 50, 75]))
    memory, flops = way.compiled.memory_analysis(), way.compiled.cost_analysis()["flops"]
    ratio = np.median(np.divide(way.times[1:], live.times[1:]))
    mb = [f"{x / 1e6:,.1f}" for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
    answers = "" if way.made is None else str(way.made.bytes_per_token)
    return [name, answers, f"{middle:,.0f} [{low:,.0f}-{high:,.0f}]", f"{ratio:.2f}", f"{flops / 1e9:,.1f}", *mb]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cached_mlm.py:smoke")
    parser.add_argument("--rounds", type=int, default=9)
    flags, overrides = parser.parse_known_args()
    config = recipe.read(flags.config, overrides).changed(checkpoint={"best": ""}, student={"init": "random"})
    with tempfile.TemporaryDirectory() as temporary:
        ways = {"live teacher": way_of(config, Path(temporary) / "live", None, 0.0)}
        for number, (name, cache) in enumerate(KINDS.items()):
            folder, began = Path(temporary) / str(number), time.perf_counter()
            made = make_cache(config.changed(cache=cache), folder / "cache", allow_pickle=False, report=say)
            seconds = time.perf_counter() - began
            cached = config.changed(teacher={"cache": str(folder / "cache")})
            ways[name] = way_of(cached, folder, made, seconds)
            say(f"{name}: {made.size:,} bytes for {made.examples:,} examples, made in {seconds:.0f} s")
        for _ in range(flags.rounds + 1):  # the first warms up
            for way in ways.values():
                run_once(way)
        table = Table(
            "way", "bytes a predicted token", "ms a step", "time / live", "GFLOP", "arguments MB", "temporaries MB"
        )
        for name, way in ways.items():
            table.add_row(*row(name, way, ways["live teacher"]))
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
