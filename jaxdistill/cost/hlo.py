"""What the text of a compiled program says: which instructions run, how often, and how many bytes they move.

Bytes move between a device and its memory, and between devices.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip

# A TPU's layouts say which arrays are on the chip itself: f32[768,512]{1,0:T(8,128)S(1)}. On other devices all arrays
# are in memory.
IN_MEMORY = r"(?!\{[^}]*S\(1\))"
# Instructions that move nothing themselves. The bodies of loops and calls are counted, and so is the end of a copy.
MOVE_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-start", "slice-start",
                "after-all", "while", "call", "conditional", "async-start", "async-done")  # fmt: skip
PREFETCHES = ("copy-done", "slice-done")
SLICES = ("slice", "dynamic-slice", "gather")
UPDATE_IN_PLACE = "dynamic-update-slice"

_CALLED = r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=(\{.*?\}|[^\s,]+)"


class Instruction(NamedTuple):
    """One line of a program: %name = shape kind(%operand, ...)."""

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


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry computation, the lines of every computation by its name)."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return entry, computations


def lines_run(text: str) -> Iterator[tuple[int, str]]:
    """(times, line) of every instruction outside fusions. A loop's body runs once a pass, and every branch once."""
    entry, computations = _computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[int, str]]:
        for line in computations[name]:
            yield times, line
            if loop := re.search(r" while\(.* condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                condition = computations[loop[1]]
                fused = re.findall(r" calls=%?([\w.-]+)", "\n".join(condition))
                condition = [*condition, *(inner for name in fused for inner in computations[name])]
                yield from walk(loop[2], times * _passes(line, condition))
            elif re.search(r" (call|conditional|async-start)\(", line):
                for called in re.findall(r"%?([\w.-]+)", " ".join(re.findall(_CALLED, line))):
                    yield from walk(called, times)

    return walk(entry, 1)


def _passes(loop: str, condition: Sequence[str]) -> int:
    """The passes of a scan: as the compiler noted them, or the one constant that the counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    constants = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(constants[0]) if len(constants) == 1 else 1


def sizes(shape: str, *, layout: str = "") -> list[int]:
    """Bytes of the arrays in an HLO shape, f32[8,16]{1,0} or a tuple of such; only of those that match `layout`."""
    arrays = re.findall(rf"(\w+)\[([\d,]*)\]{layout}", shape)
    return [BYTES.get(kind, 4) * math.prod(map(int, filter(None, axes.split(",")))) for kind, axes in arrays]


def bytes_moved(text: str) -> int:
    """Bytes that one device reads from memory and writes to it: operands and results of the instructions that run.

    XLA's own "bytes accessed" counts on-chip memory too, and the body of a loop once. As there, where an array is only
    sliced, the slices count and not the array.
    """
    _, computations = _computations(text)
    parsed = {name: [x for x in map(_parse, lines) if x] for name, lines in computations.items()}
    shapes = {x.name: x.shape for instructions in parsed.values() for x in instructions}
    in_memory: dict[str, int] = {}  # bytes in memory of every result so far, by name
    total = 0
    for times, line in lines_run(text):
        if (instruction := _parse(line)) is None:
            continue
        in_memory[instruction.name] = sum(sizes(instruction.shape, layout=IN_MEMORY))
        if instruction.kind in PREFETCHES:  # one end of the copy is on the chip
            total += times * sum(sizes(instruction.shape))
        elif instruction.kind not in MOVE_NOTHING:
            fusion = re.search(r" fusion\(.* calls=%?([\w.-]+)", line)
            inside = parsed[fusion[1]] if fusion else [instruction]
            written = min(in_memory[instruction.name], _bytes_written(instruction, inside[-1], shapes))
            total += times * (_bytes_read(instruction, inside, in_memory) + written)
    return total


def _bytes_written(instruction: Instruction, last: Instruction, shapes: Mapping[str, str]) -> int:
    """Bytes of the result, or of the new part of an array that is updated in place.

    `last` is the last instruction of a fusion, or the instruction itself.
    """
    return sum(sizes(shapes[last.operands[1]] if last.kind == UPDATE_IN_PLACE else instruction.shape))


def _bytes_read(instruction: Instruction, inside: Sequence[Instruction], in_memory: Mapping[str, int]) -> int:
    """Bytes that an instruction reads; `inside` are the instructions of its fusion, or the instruction itself."""
    parameters = {int(found[1]): x.name for x in inside if (found := re.search(r" parameter\((\d+)\)", x.line))}
    total = 0
    for i, operand in enumerate(instruction.operands):
        name, whole = parameters.get(i, operand), in_memory.get(operand, 0)
        users = [x for x in inside if name in x.operands]
        slices = [sum(sizes(x.shape)) for x in users if x.kind in SLICES and x.operands[0] == name]
        updates = [x for x in users if x.kind == UPDATE_IN_PLACE and x.operands[0] == name]  # these do not read
        is_read_whole = not users or len(slices) + len(updates) < len(users)
        total += whole if is_read_whole else min(whole, sum(slices))
    return total


def collectives(text: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective on one device."""
    total: dict[str, int] = {}
    for times, line in lines_run(text):
        # "name = f32[8,16]{1,0} all-reduce(...)", "... all-gather-start(...)". A -done is not counted again.
        if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
            # The shape of a -start holds its operand beside its result.
            results = sizes(match[1])
            total[match[2]] = total.get(match[2], 0) + times * (max(results) if match[3] else sum(results))
    return total
