"""Charts as SVG, drawn in a page's own colours: they turn dark with it, and need no library."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdistill.report.contents import Bin, Points, short

WIDTH, HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 10, 24
_MOST_POINTS = 200  # a chart has no more pixels to show them; of more, means are drawn
_MOST_DOTS = 40  # points that say their value under the pointer
_LOG_FROM = 30.0  # ratio of the largest to the smallest value from which an axis is logarithmic


class Line(NamedTuple):
    """One curve of a chart."""

    name: str
    style: str  # class of the page: c0, c1, ... of the runs, and `teacher`
    points: Points


class _Axis(NamedTuple):
    """From values to places on the page."""

    low: float
    high: float
    start: float  # place of `low`
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(lines: Sequence[Line], *, label: str, may_be_log: bool = True) -> str:
    """Curves over the steps of training.

    Args:
      may_be_log: whether a wide range of positive values has a logarithmic axis.
    """
    height = HEIGHT
    lines = [line._replace(points=_thinned(line.points)) for line in lines if line.points]
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    if not values:
        return ""
    log = may_be_log and min(values) > 0 and max(values) / min(values) > _LOG_FROM
    across = _axis(min(steps), max(steps), _LEFT, WIDTH - _RIGHT)
    up = _axis(min(values), max(values), height - _BOTTOM, _TOP, log=log)
    parts = [*_grid(up, short), *_steps(across, height)]
    for line in lines:
        places = [(across.at(step), up.at(value)) for step, value in line.points]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        parts.append(f'<path class="line {line.style}" d="{path}"><title>{escape(line.name)}</title></path>')
        every = -(-len(places) // _MOST_DOTS)
        for (x, y), (step, value) in list(zip(places, line.points, strict=True))[::every]:
            told = escape(f"{line.name}, step {step:,.0f}: {short(value)}")
            parts.append(f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{told}</title></circle>')
        if len(places) == 1:
            parts.append(f'<circle class="dot {line.style}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
    return _svg(parts, label=label + (", logarithmic" if log else ""), height=height)


def calibration_chart(models: Sequence[tuple[str, str, Sequence[Bin]]]) -> str:
    """How often a word is right, over how sure the model is of it: (name, style, bins) of each model."""
    height = 260
    across = _Axis(0.0, 1.0, _LEFT, WIDTH - _RIGHT)
    up = _Axis(0.0, 1.0, height - _BOTTOM, _TOP)
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    parts = [*_grid(up, _percent, ticks)]
    parts += [_text(across.at(tick), height - 8, _percent(tick), "middle") for tick in ticks]
    parts.append(
        f'<path class="ideal" d="M{across.at(0):.1f} {up.at(0):.1f} L{across.at(1):.1f} {up.at(1):.1f}">'
        "<title>as often right as it is sure</title></path>"
    )
    for name, style, bins in models:
        places = [(across.at(one.confidence), up.at(one.accuracy)) for one in bins]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        parts.append(f'<path class="line {style}" d="{path}"><title>{escape(name)}</title></path>')
        for (x, y), one in zip(places, bins, strict=True):
            told = f"{name}: {one.confidence:.0%} sure, {one.accuracy:.0%} right, {one.share:.0%} of the tokens"
            parts.append(
                f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="{2 + 5 * math.sqrt(one.share):.1f}">'
                f"<title>{escape(told)}</title></circle>"
            )
    return _svg(parts, label="accuracy over confidence", height=height)


def dot_chart(rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]]) -> str:
    """A row for each label with a dot for each (model, style, value), on a logarithmic axis."""
    values = [value for _, dots in rows for _, _, value in dots]
    height, left, step = 36 + 56 * len(rows), 78, 56
    across = _axis(min(values), max(values), left, WIDTH - _RIGHT - 6, log=min(values) > 0)
    parts = []
    for tick in _ticks(across, most=4):
        x = across.at(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP} V{height - _BOTTOM}"/>')
        parts.append(_text(x, height - 8, short(tick), "middle"))
    for i, (label, dots) in enumerate(rows):
        y = _TOP + step * i + step / 2
        parts.append(_text(0, y + 4, label, "start", "name"))
        ends = sorted(across.at(value) for _, _, value in dots)
        parts.append(f'<path class="span" d="M{ends[0]:.1f} {y:.1f} H{ends[-1]:.1f}"/>')
        for name, style, value in reversed(dots):
            told = escape(f"{name}, {label.lower()}: {short(value)}")
            parts.append(
                f'<circle class="dot {style}" cx="{across.at(value):.1f}" cy="{y:.1f}" r="6">'
                f"<title>{told}</title></circle>"
            )
    return _svg(parts, label="perplexity by frequency of the word", height=height)


def heat_map(values: Float[np.ndarray, "rows columns"], *, across: str, down: str) -> str:
    """A cell for each pair of layers, the embeddings first; the fuller the colour, the more alike."""
    rows, columns = values.shape
    left, top = 44, 34
    cell = min((WIDTH - left - 2) / columns, 52.0)
    high = min(cell, 40.0)
    width, height = left + cell * columns, top + high * rows
    parts = [
        _text(left + cell * columns / 2, 10, across, "middle", "name"),
        f'<text class="name" text-anchor="middle" transform="translate(10 {top + high * rows / 2:.1f}) rotate(-90)">'
        f"{escape(down)}</text>",
    ]
    for column in range(columns):
        if columns <= 14 or column % 4 == 0:
            parts.append(_text(left + cell * (column + 0.5), top - 8, _layer(column), "middle"))
    for row in range(rows):
        if rows <= 26 or row % 4 == 0:
            parts.append(_text(left - 6, top + high * (row + 0.5) + 4, _layer(row), "end"))
        for column in range(columns):
            value = float(np.clip(values[row, column], 0.0, 1.0))
            x, y = left + cell * column, top + high * row
            told = f"{down} {_layer(row)}, {across} {_layer(column)}: {value:.3f}"
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{high - 2:.1f}" '
                f'rx="3" fill-opacity="{0.04 + 0.96 * value**2:.3f}"><title>{escape(told)}</title></rect>'
            )
            if cell >= 22:
                style = "full" if value**2 > 0.5 else "faint"
                number = f"{value:.2f}".removeprefix("0") if value < 1 else "1"
                parts.append(_text(x + cell / 2, y + high / 2 + 4, number, "middle", style))
    return _svg(parts, label=f"similarity of {down} and {across}", height=math.ceil(height), width=math.ceil(width))


def _layer(index: int) -> str:
    return "emb" if index == 0 else str(index)


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _axis(low: float, high: float, start: float, end: float, *, log: bool = False) -> _Axis:
    """An axis with some room around its values."""
    if log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return _Axis(low / room, high * room, start, end, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return _Axis(low if start < end else low - room, high if start < end and high > low else high + room, start, end)


def _ticks(axis: _Axis, *, most: int) -> list[float]:
    """Round values along an axis."""
    if axis.log:
        powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**power for power in powers for digit in digits]
            ticks = [tick for tick in ticks if axis.low <= tick <= axis.high]
            if len(ticks) <= most:
                break
        every = -(-len(ticks) // most)
        return ticks[::every] or [axis.low, axis.high]
    rough = (axis.high - axis.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough)
    first = math.ceil(axis.low / step)
    return [i * step for i in range(first, math.floor(axis.high / step) + 1)]


def _grid(up: _Axis, name: Callable[[float], str], ticks: Sequence[float] = ()) -> list[str]:
    parts = []
    for tick in ticks or _ticks(up, most=4):
        y = up.at(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f} H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, name(tick), "end"))
    return parts


def _steps(across: _Axis, height: int) -> list[str]:
    ticks = [tick for tick in _ticks(across, most=4) if tick == int(tick)]
    return [_text(across.at(tick), height - 8, _whole(tick), "middle") for tick in ticks]


def _whole(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:,.0f}"


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], *, label: str, height: int, width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width * 1.4:.0f}px">{"".join(parts)}</svg>'
    )


def _thinned(points: Points) -> Points:
    """At most _MOST_POINTS points: means over as many neighbours as that takes."""
    every = -(-len(points) // _MOST_POINTS)
    if every == 1:
        return points
    pieces = [points[i : i + every] for i in range(0, len(points), every)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]
