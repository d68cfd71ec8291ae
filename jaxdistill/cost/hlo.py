"""The text of a compiled program: which of its lines run, how often, and what they move: to memory, between devices."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip

# A TPU's layouts say what lies on the chip itself: f32[768,512]{1,0:T(8,128)S(1)}. Elsewhere all is in memory.
IN_MEMORY = r"(?!\{[^}]*S\(1\))"
SILENT = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-start", "slice-start", "after-all",
          "while", "call", "conditional", "async-start", "async-done")  # fmt: skip
PREFETCHED = ("copy-done", "slice-done")
PICKED = ("slice", "dynamic-slice", "gather")
WRITTEN_INTO = "dynamic-update-slice"


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    line: str


def _parse(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)
    if found is None:
        return None
    name, shape, kind, operands = found.groups()
    return Instruction(name, shape, kind, tuple(re.findall(r"%([\w.-]+)", operands)), line)


def _bodies(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry, lines by computation)."""
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
    return entry, bodies


def lines_run(text: str) -> Iterator[tuple[int, str]]:
    """(times, line) of every instruction but those inside fusions: loops times their passes, every branch once."""
    entry, bodies = _bodies(text)

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


def sizes(shape: str, *, layout: str = "") -> list[int]:
    """Bytes of the arrays in an HLO shape, f32[8,16]{1,0} or a tuple of them; `layout` matches theirs."""
    arrays = re.findall(rf"(\w+)\[([\d,]*)\]{layout}", shape)
    return [BYTES.get(kind, 4) * math.prod(map(int, filter(None, axes.split(",")))) for kind, axes in arrays]


def bytes_moved(text: str) -> int:
    """Read from memory and written to it by one device, by what the program's instructions take and give.

    XLA's own "bytes accessed" has on-chip memory in it, and the body of a loop once. As there, of an array that is
    only sliced, the slices count.
    """
    _, bodies = _bodies(text)
    fused = {name: [x for x in map(_parse, body) if x] for name, body in bodies.items()}
    shapes = {x.name: x.shape for body in fused.values() for x in body}
    held: dict[str, int] = {}  # bytes in memory, by name
    total = 0
    for times, line in lines_run(text):
        if (one := _parse(line)) is None:
            continue
        held[one.name] = sum(sizes(one.shape, layout=IN_MEMORY))
        if one.kind in SILENT:
            continue
        if one.kind in PREFETCHED:  # one of its sides is on the chip
            moved = sum(sizes(one.shape))
        else:
            called = re.search(r" fusion\(.* calls=%?([\w.-]+)", line)
            inside = fused[called[1]] if called else [one]
            # Written into an array that is there, the new part counts.
            last = inside[-1]
            part = sizes(shapes[last.operands[1]]) if last.kind == WRITTEN_INTO else sizes(one.shape)
            moved = _taken(one, inside, held) + min(held[one.name], sum(part))
        total += times * moved
    return total


def _taken(one: Instruction, inside: Sequence[Instruction], held: Mapping[str, int]) -> int:
    """Bytes that an instruction reads; `inside` are those of its fusion, or itself."""
    total = 0
    named = {int(found[1]): x.name for x in inside if (found := re.search(r" parameter\((\d+)\)", x.line))}
    for i, operand in enumerate(one.operands):
        name = named.get(i, operand)
        users = [x for x in inside if name in x.operands]
        picked = [sum(sizes(x.shape)) for x in users if x.kind in PICKED and x.operands[0] == name]
        into = [x for x in users if x.kind == WRITTEN_INTO and x.operands[0] == name]  # in place: not read
        whole = not users or len(picked) + len(into) < len(users)
        total += held.get(operand, 0) if whole else min(held.get(operand, 0), sum(picked))
    return total


def collectives(text: str) -> dict[str, int]:
    """Bytes that come out of each kind of collective on one device."""
    found: dict[str, int] = {}
    for times, line in lines_run(text):
        # "name = f32[8,16]{1,0} all-reduce(...)", "... all-gather-start(...)"; a -done is the same one again.
        if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
            # A -start carries its operand beside its result.
            out = sizes(match[1])
            found[match[2]] = found.get(match[2], 0) + times * (max(out) if match[3] else sum(out))
    return found
