"""All that a report shows, as plain values: nothing here knows of models, of run folders, or of HTML."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Points = Sequence[tuple[float, float]]  # (step, value)


class Curves(NamedTuple):
    """The figures of one run over its steps, by name."""

    run: str
    train: Mapping[str, Points]
    evaluation: Mapping[str, Points]


class Bin(NamedTuple):
    """The tokens of which a model was sure to about the same degree."""

    confidence: float  # mean probability of the likeliest word
    accuracy: float  # how often this word is right
    share: float  # of all tokens


class Portrait(NamedTuple):
    """One model, as measured."""

    name: str
    what: str  # as "bert, 2 layers of width 128"
    figures: Mapping[str, float]  # by the names of FIGURES
    calibration: Sequence[Bin] = ()
    similarity: Float[np.ndarray, "states teacher_states"] | None = None  # of hidden states, the embeddings first


class Example(NamedTuple):
    """A text, and what each model makes of it."""

    prompt: str
    expected: str  # how the text goes on, or its masked word; "" where nobody knows
    # By name of the model: the likeliest words with their probabilities, or the text that the model writes.
    words: Mapping[str, Sequence[tuple[str, float]]] = {}
    texts: Mapping[str, str] = {}


class Near(NamedTuple):
    """The words nearest to one word, by the model."""

    word: str
    models: Mapping[str, Sequence[tuple[str, float]]]  # (word, cosine), the nearest first


class Made(NamedTuple):
    """Where one run comes from."""

    run: str
    sentence: str
    changed: Mapping[str, object]  # settings that are not at their defaults
    settings: str  # all of them, as JSON


class Report(NamedTuple):
    """The contents of a page."""

    title: str
    text: str  # what was measured on
    when: str
    command: str
    versions: Mapping[str, str]
    curves: Sequence[Curves]
    made: Sequence[Made]
    portraits: Sequence[Portrait] = ()  # the teacher first, where there is one
    has_teacher: bool = False
    examples: Sequence[Example] = ()
    neighbours: Sequence[Near] = ()
    measured_how: str = ""  # device, rows and repetitions of the latency


class Figure(NamedTuple):
    """How a figure is written."""

    label: str
    unit: str  # count, bytes, ms, share or number
    note: str = ""
    lower_is_better: bool | None = None  # None = neither
    beside: bool = True  # whether its ratio to the teacher's is of interest


# Group -> figure -> how it is written, in the order of the table.
GROUPS: Mapping[str, Mapping[str, Figure]] = {
    "Size": {
        "parameters": Figure("Parameters", "count", lower_is_better=True),
        "bytes": Figure("Size on disk", "bytes", "as exported, in float32", lower_is_better=True),
    },
    "Speed": {
        "latency": Figure("Latency", "ms", "fastest of 30 forward passes", lower_is_better=True),
        "peak": Figure("Peak memory", "bytes", "of one pass, in a process of its own", lower_is_better=True),
        "memory": Figure("Memory as compiled", "bytes", "weights and temporaries of a pass", lower_is_better=True),
    },
    "On held-out text": {
        "perplexity": Figure("Perplexity", "number", lower_is_better=True),
        "accuracy": Figure("Right words", "share", "the likeliest word is the true one", False),
        "ece": Figure("Calibration error", "share", "mean gap of confidence and accuracy", True, beside=False),
    },
    "Beside the teacher": {
        "kl": Figure("KL from the teacher", "number", "nats a token", True, beside=False),
        "top1": Figure("Agreement at 1", "share", "the teacher's likeliest word is the model's", False, beside=False),
        "top2": Figure("Agreement at 2", "share", "it is among the model's two likeliest", False, beside=False),
        "top5": Figure("Agreement at 5", "share", "", False, beside=False),
        "top10": Figure("Agreement at 10", "share", "", False, beside=False),
    },
    "Perplexity by how frequent the word is": {
        "frequent": Figure("Frequent words", "number", "half of all tokens", lower_is_better=True),
        "common": Figure("Common words", "number", "the next 40 %", lower_is_better=True),
        "rare": Figure("Rare words", "number", "the last 10 %", lower_is_better=True),
    },
}


def written(value: float, unit: str) -> str:
    """A value for people."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "ms":
        return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
    if unit in ("bytes", "count"):
        return scaled(value, "B" if unit == "bytes" else "")
    return short(value)


def scaled(value: float, unit: str) -> str:
    """12.3 M, 4.5 GB, 900."""
    for power, prefix in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g}{f' {unit}' if unit else ''}"


def short(value: float) -> str:
    """A number in as few letters as three digits need."""
    if 1e4 <= abs(value) < 1e12:
        return scaled(value, "")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def headline(report: Report) -> str:
    """The first student beside the teacher, in one sentence; "" where they were not measured."""
    if not report.has_teacher or len(report.portraits) < 2:
        return ""
    teacher, student = (portrait.figures for portrait in report.portraits[:2])
    size, time = student["parameters"] / teacher["parameters"], student["latency"] / teacher["latency"]
    return (
        f"{report.portraits[1].name} has {size:.0%} of its teacher's parameters and takes {time:.0%} of its time. "
        f"Its likeliest word is the teacher's for {student['top1']:.0%} of the tokens, and its perplexity is "
        f"{short(student['perplexity'])} where the teacher's is {short(teacher['perplexity'])}."
    )
