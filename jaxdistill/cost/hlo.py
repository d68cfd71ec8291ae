"""What the text of a compiled program says: which instructions run, how often, what they multiply and what they move.

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
_CALLS = ("call", "conditional", "async-start")
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape")  # of a number


class Instruction(NamedTuple):
    """One line of a program: %name = shape kind(%operand, ...)."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    line: str


class Run(NamedTuple):
    """An instruction that runs."""

    times: int
    instruction: Instruction
    computation: str  # in which it stands


class Program:
    """The computations of a program, by the text of it."""

    def __init__(self, text: str):
        self.entry, lines = _computations(text)
        self.computations = {name: [x for x in map(_parse, body) if x] for name, body in lines.items()}
        self._named = {name: {x.name: x for x in body} for name, body in self.computations.items()}

    def instruction(self, computation: str, name: str) -> Instruction | None:
        """The instruction of this name in a computation; None where its line is of a form that is not known here."""
        return self._named[computation].get(name)

    def root(self, computation: str) -> Instruction | None:
        body = self.computations[computation]
        return next((x for x in body if x.line.lstrip().startswith("ROOT ")), body[-1] if body else None)

    def shape(self, computation: str, name: str) -> str:
        found = self.instruction(computation, name)
        return found.shape if found else ""

    def fused(self, instruction: Instruction) -> str:
        """The computation that a fusion calls; "" for any other instruction."""
        found = re.search(r" fusion\(.* calls=%?([\w.-]+)", instruction.line)
        return found[1] if found else ""

    def runs(self, *, inside_fusions: bool) -> Iterator[Run]:
        """Every instruction that runs. A loop's body runs once a pass, and every branch once."""

        def walk(computation: str, times: int) -> Iterator[Run]:
            for x in self.computations[computation]:
                yield Run(times, x, computation)
                if x.kind == "while":
                    loop = re.search(r" condition=%?([\w.-]+), body=%?([\w.-]+)", x.line)
                    assert loop, x.line
                    yield from walk(loop[2], times * self._passes(x, computation, loop[1], loop[2]))
                elif x.kind in _CALLS:
                    for called in re.findall(r"%?([\w.-]+)", " ".join(re.findall(_CALLED, x.line))):
                        yield from walk(called, times)
                elif inside_fusions and (fused := self.fused(x)):
                    yield from walk(fused, times)

        return walk(self.entry, 1)

    def _passes(self, loop: Instruction, computation: str, condition: str, body: str) -> int:
        """The passes of a loop: as the compiler noted them, or by start, step and bound of the counter.

        A start that is not known counts as 0, so that the passes are the most that there can be. A loop without a known
        bound counts once.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.line):
            return int(known[1])
        bounds = list(self._bounds(condition))
        if not bounds:
            return 1
        index, bound = min(bounds, key=lambda found: found[1])
        start = self._element(computation, loop.operands[0], index)
        new = self.root(body)
        step = self._number(body, new.operands[index], {}) if new and index < len(new.operands) else None
        by = step.offset if step and step.index == index and step.offset > 0 else 1
        begin = start.offset if start and start.index is None else 0
        return max(-(-(bound - begin) // by), 1)

    def _bounds(self, condition: str, bound_to: Mapping[int, "_Number"] | None = None) -> Iterator[tuple[int, int]]:
        """(index of the counter in the loop's tuple, the number that it stays below) of every such comparison."""
        bound_to = bound_to or {}
        for x in self.computations[condition]:
            if fused := self.fused(x):
                arguments = self._arguments(condition, x, bound_to)
                yield from self._bounds(fused, arguments)
            if x.kind != "compare":
                continue
            left, right = (self._number(condition, name, bound_to) for name in x.operands)
            direction = re.search(r"direction=(\w+)", x.line)
            if direction and direction[1] in ("GT", "GE"):
                left, right = right, left
            if left and right and left.index is not None and right.index is None:
                at_end = direction is not None and direction[1] in ("LE", "GE")
                yield left.index, right.offset - left.offset + at_end

    def _element(self, computation: str, name: str, index: int) -> "_Number | None":
        made = self.instruction(computation, name)
        if made is None or made.kind != "tuple" or index >= len(made.operands):
            return None
        return self._number(computation, made.operands[index], {})

    def _arguments(
        self, computation: str, call: Instruction, bound_to: Mapping[int, "_Number"]
    ) -> dict[int, "_Number"]:
        numbers = {i: self._number(computation, name, bound_to) for i, name in enumerate(call.operands)}
        return {i: number for i, number in numbers.items() if number is not None}

    def _number(self, computation: str, name: str, bound_to: Mapping[int, "_Number"]) -> "_Number | None":
        """What is known of a whole number: itself, or that it is an element of the loop's tuple plus a number."""
        x = self.instruction(computation, name)
        if x is None or not re.match(r"[su]\d+\[\]", x.shape):
            return None
        if found := re.search(r" constant\((-?\d+)\)", x.line):
            return _Number(None, int(found[1]))
        if found := re.search(r" get-tuple-element\(.*\), index=(\d+)", x.line):
            return _Number(int(found[1]), 0)
        if found := re.search(r" parameter\((\d+)\)", x.line):
            return bound_to.get(int(found[1]))
        if x.kind in _SAME_VALUE:
            return self._number(computation, x.operands[0], bound_to)
        if x.kind == "add":
            a, b = (self._number(computation, operand, bound_to) for operand in x.operands)
            if a and b and (a.index is None or b.index is None):
                return _Number(b.index if a.index is None else a.index, a.offset + b.offset)
        if (fused := self.fused(x)) and (root := self.root(fused)):
            return self._number(fused, root.name, self._arguments(computation, x, bound_to))
        return None


class _Number(NamedTuple):
    """A whole number: an element of a loop's tuple (None: no element) plus an offset."""

    index: int | None
    offset: int


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
    return ((run.times, run.instruction.line) for run in Program(text).runs(inside_fusions=False))


def sizes(shape: str, *, layout: str = "") -> list[int]:
    """Bytes of the arrays in an HLO shape, f32[8,16]{1,0} or a tuple of such; only of those that match `layout`."""
    arrays = re.findall(rf"(\w+)\[([\d,]*)\]{layout}", shape)
    return [BYTES.get(kind, 4) * math.prod(map(int, filter(None, axes.split(",")))) for kind, axes in arrays]


def _axes(shape: str) -> list[int]:
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(n) for n in filter(None, found[1].split(","))] if found else []


def flops(text: str) -> float:
    """Arithmetic of one device: two operations for every product of two numbers in products of matrices.

    A kernel that is no HLO (splash, cuDNN's attention) has none here.
    """
    program, total = Program(text), 0.0
    for times, x, computation in program.runs(inside_fusions=True):
        if x.kind == "dot":
            total += times * _of_dot(x, _axes(program.shape(computation, x.operands[0])))
        elif x.kind == "convolution":
            total += times * _of_convolution(x, *(_axes(program.shape(computation, name)) for name in x.operands))
        elif x.kind == "custom-call" and "lhs_contracting_dimensions" in x.line:  # cuBLAS
            total += times * _of_dot(x, _axes(program.shape(computation, x.operands[0])))
    return total


def _of_dot(x: Instruction, left: Sequence[int]) -> float:
    axes = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)", x.line)
    summed = [int(i) for i in re.findall(r"\d+", axes[1])] if axes else []
    result = _axes(x.shape.lstrip("("))  # cuBLAS gives its workspace beside the result
    return 2.0 * math.prod(result) * math.prod(left[i] for i in summed)


def _of_convolution(x: Instruction, left: Sequence[int], right: Sequence[int]) -> float:
    """A TPU's compiler writes products as convolutions, with axes of a batch as dilated or padded windows.

    What a window reads of padding, or between the entries of a dilated array, is no work.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.line)
    window = re.search(r"window=\{([^}]*)\}", x.line)
    groups = re.search(r"batch_group_count=(\d+)", x.line)
    assert labels, x.line
    result = _axes(x.shape)
    size_of = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    kernel = dict(zip(labels[2], right, strict=True))
    given = dict(zip(labels[1], left, strict=True))
    made = dict(zip(labels[3], result, strict=True))
    total = 2.0 * kernel["i"] * made["b"] * made["f"] / (int(groups[1]) if groups else 1)
    for axis in sorted(label for label in labels[2] if label.isdigit()):
        total *= _pairs(size_of, int(axis), given[axis], kernel[axis], made[axis])
    return total


def _pairs(window: Mapping[str, str], axis: int, given: int, kernel: int, made: int) -> int:
    """Pairs (entry of the result, entry of the kernel) along an axis that meet an entry of the array."""

    def of(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    before, stride = int(of("pad", "0_0").split("_")[0]), int(of("stride", "1"))
    apart, spread = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    places = (i * stride + k * spread - before for i in range(made) for k in range(kernel))
    return sum(place >= 0 and place % apart == 0 and place // apart < given for place in places)


def bytes_moved(text: str) -> int:
    """Bytes that one device reads from memory and writes to it: operands and results of the instructions that run.

    XLA's own "bytes accessed" counts on-chip memory too, and the body of a loop once. As there, where an array is only
    sliced, the slices count and not the array.
    """
    program = Program(text)
    shapes = {x.name: x.shape for instructions in program.computations.values() for x in instructions}
    in_memory: dict[str, int] = {}  # bytes in memory of every result so far, by name
    total = 0
    for times, instruction, _ in program.runs(inside_fusions=False):
        in_memory[instruction.name] = sum(sizes(instruction.shape, layout=IN_MEMORY))
        if instruction.kind in PREFETCHES:  # one end of the copy is on the chip
            total += times * sum(sizes(instruction.shape))
        elif instruction.kind not in MOVE_NOTHING:
            fusion = program.fused(instruction)
            inside = program.computations[fusion] if fusion else [instruction]
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
    for times, x, _ in Program(text).runs(inside_fusions=True):
        kind = x.kind.removesuffix("-start")  # a -done is not counted again
        if kind in COLLECTIVES:
            total[kind] = total.get(kind, 0) + times * sum(sizes(_result_of(x)))
    return total


def _result_of(x: Instruction) -> str:
    """The shape of a collective's result. That of a -start, but for all-reduce, has its operand before the result."""
    if not x.kind.endswith("-start") or x.kind.startswith("all-reduce"):
        return x.shape
    parts = _elements(x.shape)
    return parts[1] if len(parts) > 1 else x.shape


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples themselves."""
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[begin:i])
            begin = i + 1
    return parts
