"""A step compiled for TPU slices that are not here: exact counts, and where the compiler expects the time to go.

    pip install 'jaxdistill[tpu]'
    python benchmarks/tpu.py [--topology v5e:2x4 v5e:4x4] [--ways 1 2 4 1:dots 1:full] [--rows 256] [--parts 12]

BERT-base into DistilBERT by the recipe configs/bert_mlm.py in bfloat16, `rows` of 128 tokens a device, every token
through the head; a way is a number of micro-batches, and what is rematerialised. Nothing is run. Memory, work and
collectives are those of `jaxdistill plan`, the same in every run. `expected` is the sum of what the TPU compiler's cost
model expects of each instruction, one after the other, loops times their passes, without collectives: no measurement,
but it knows the vector unit, which counts of work and bytes do not. Its form is nobody's promise: `plan` leaves it out.
--parts splits it by part of the models.
"""

import argparse
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jaxdistill.cost import hlo
from jaxdistill.cost.plan import read_target
from jaxdistill.cost.program import UPDATE, Memory, compile_or_need, devices_of, memory_of, parts
from jaxdistill.cost.roofline import Work, seconds
from jaxdistill.step.chips import chip_of

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "bert_mlm.py"
# Cycles a second, of the unit that multiplies matrices: the peak of chips.CHIPS over its products a cycle.
CLOCK = {"TPU v5 lite": 1.5e9}


class Figures(NamedTuple):
    memory: Memory
    work: Work
    collectives: dict[str, int]
    cycles: dict[str, int]  # expected, by source


def figures(topology: str, settings: dict[str, Any]) -> Figures:
    """Of one step on a slice, a device. `settings` are the recipe's."""
    from transformers import BertConfig

    with tempfile.TemporaryDirectory() as folder:
        BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder)
        settings = {
            "teacher.name": folder,
            "teacher.dtype": "bfloat16",
            "student.dtype": "bfloat16",
            **settings,
        }
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        target = read_target(str(RECIPE), overrides, topology=topology)
    compiled, needed = compile_or_need(parts(target)[UPDATE].lower)
    if needed is not None:
        raise SystemExit(f"{topology}, {settings}: needs {needed / 1e9:.1f} GB a device")
    text = compiled.as_text()
    cycles: Counter[str] = Counter()
    for source, expected in expectations(text):
        cycles[source] += expected
    work = Work(hlo.flops(text), hlo.bytes_moved(text))
    return Figures(memory_of(compiled), work, hlo.collectives(text), dict(cycles))


def expectations(text: str) -> Iterator[tuple[str, int]]:
    """(operation that it comes from, cycles) of every instruction that runs, loops times their passes."""
    for times, line in hlo.lines_run(text):
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            source = re.search(r'op_name="([^"]*)"', line)
            yield source[1] if source else "", times * int(cycles[1])


def part(source: str) -> str:
    """jit(step)/transpose(jvp(FlaxBert…Module))/bert/encoder/layer/3/output/dense/add -> teacher …, by its module."""
    if "shard_map" in source:
        return "head"
    module = re.search(r"Flax(\w+?)For\w+Module\)+/(.*)", source)
    if not module:
        return "update and the rest"
    way = "backward " if "transpose(" in source else ""
    path = re.sub(r".*layer/\d+/", "layer/", module[2]).split("/")
    return (
        f"{'student' if 'Distil' in module[1] else 'teacher'} {way}{'/'.join(path[: 2 + (path[1:2] == ['attention'])])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=["v5e:2x4", "v5e:4x4"])
    parser.add_argument("--ways", nargs="+", default=["1", "2", "4", "1:dots", "1:full"])
    parser.add_argument("--rows", type=int, default=256, help="a device")
    parser.add_argument("--parts", type=int, default=0, help="also how many parts to show of each")
    args = parser.parse_args()
    columns = "slice", "micro-batches", "remat", "temporary GB", "peak GB", "TFLOP", "ms", "moved GB", "ms"
    table = Table(*columns, "collectives GB", "expected ms")
    for column in table.columns[3:]:
        column.justify = "right"
    console = Console(width=140)
    for topology, way in itertools.product(args.topology, args.ways):
        devices = devices_of(topology)
        chip, clock = chip_of(devices[0]), CLOCK.get(devices[0].device_kind)
        if chip is None or clock is None:
            raise SystemExit(f"--topology {topology}: only {', '.join(CLOCK)} is known here")
        accumulation, _, remat = way.partition(":")
        settings = {"train.batch_size": args.rows * len(devices), "train.accumulation": accumulation}
        found = figures(topology, settings | {"student.remat": remat})
        arithmetic, memory = seconds(found.work, chip)
        table.add_row(
            topology,
            accumulation,
            remat or "none",
            *(f"{size / 1e9:.2f}" for size in (found.memory.temporaries, found.memory.peak)),
            f"{found.work.flops / 1e12:.2f}",
            f"{1e3 * arithmetic:.1f}",
            f"{found.work.bytes_moved / 1e9:.1f}",
            f"{1e3 * memory:.1f}",
            f"{sum(found.collectives.values()) / 1e9:.2f}",
            f"{1e3 * sum(found.cycles.values()) / clock:.0f}",
        )
        if args.parts:
            console.print(f"{topology}, {way}", by_part(found.cycles, clock, args.parts))
    console.print(f"BERT-base into DistilBERT, bfloat16, {args.rows} x 128 tokens a device", table)


def by_part(cycles: dict[str, int], clock: float, most: int) -> Table:
    total: Counter[str] = Counter()
    for source, expected in cycles.items():
        total[part(source)] += expected
    table = Table("part", "expected ms", "share")
    for name, expected in total.most_common(most):
        table.add_row(name, f"{1e3 * expected / clock:.1f}", f"{expected / total.total():.2f}")
    return table


if __name__ == "__main__":
    main()
