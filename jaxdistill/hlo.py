"""The text of a compiled program: which of its lines run, how often, and what they move between devices."""

import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip


def lines_run(text: str) -> Iterator[tuple[int, str]]:
    """(times, line) of every instruction but those inside fusions: loops times their passes, every branch once."""
    bodies: dict[str, list[str]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            body = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None:
            body.append(line)

    def walk(name: str, times: int) -> Iterator[tuple[int, str]]:
        for line in bodies[name]:
            yield times, line
            if loop := re.search(r" while\(.* condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                yield from walk(loop[2], times * _passes(line, bodies[loop[1]]))
            elif re.search(r" (call|conditional|async-start)\(", line):
                for called in re.findall(r"%?([\w.-]+)", " ".join(re.findall(_CALLED, line))):
                    yield from walk(called, times)

    return walk(entry, 1)


_CALLED = r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=(\{.*?\}|[^\s,]+)"


def _passes(loop: str, condition: list[str]) -> int:
    """Of a scan: as the compiler found it, or the one constant that its counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    constants = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(constants[0]) if len(constants) == 1 else 1


def shapes(text: str, *, of: str = "") -> list[int]:
    """Bytes of the arrays in an HLO shape, f32[8,16]{1,0} or a tuple of them; `of` matches their layouts."""
    arrays = re.findall(rf"(\w+)\[([\d,]*)\]{of}", text)
    return [BYTES.get(kind, 4) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in arrays]


def collectives(text: str) -> dict[str, int]:
    """Bytes that come out of each kind of collective on one device."""
    found: dict[str, int] = {}
    for times, line in lines_run(text):
        # "name = f32[8,16]{1,0} all-reduce(...)", "... all-gather-start(...)"; a -done is the same one again.
        if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
            # A -start carries its operand beside its result.
            sizes = shapes(match[1])
            found[match[2]] = found.get(match[2], 0) + times * (max(sizes) if match[3] else sum(sizes))
    return found
