"""A report as Markdown, for an issue, a wiki or a terminal."""

from collections.abc import Iterator, Sequence

from jaxdistill.report.contents import GROUPS, Example, Points, Report, headline, short, written


def markdown(report: Report) -> str:
    """The page without its charts; of the curves, first, best and last values."""
    parts = [
        [f"# {report.title}", "", f"Measured on {report.text}. {report.when}."],
        [headline(report)] if headline(report) else [],
        list(_side_by_side(report)),
        list(_examples(report.examples)),
        list(_neighbours(report)),
        list(_curves(report)),
        list(_made(report)),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _side_by_side(report: Report) -> Iterator[str]:
    if not report.portraits:
        return
    yield from ["## Side by side", ""]
    rows = []
    for figures in GROUPS.values():
        for name, figure in figures.items():
            values = [portrait.figures.get(name) for portrait in report.portraits]
            if any(value is not None for value in values):
                label = f"{figure.label} ({figure.note})" if figure.note else figure.label
                rows.append([label, *("" if value is None else written(value, figure.unit) for value in values)])
    yield from _table(["", *(portrait.name for portrait in report.portraits)], rows)
    yield from ["", f"Latency and memory: {report.measured_how}."]


def _examples(examples: Sequence[Example]) -> Iterator[str]:
    if not examples:
        return
    yield from ["## Examples", ""]
    for example in examples:
        yield f"- {' '.join(example.prompt.split())}" + (f" (the text: {example.expected})" if example.expected else "")
        for name, words in example.words.items():
            yield f"  - {name}: {', '.join(f'{word} {p:.0%}' for word, p in words)}"
        for name, text in example.texts.items():
            yield f"  - {name}: {' '.join(text.split())}"


def _neighbours(report: Report) -> Iterator[str]:
    if not report.neighbours:
        return
    yield from ["## Nearest words", ""]
    names = [portrait.name for portrait in report.portraits]
    found = [
        [near.word, *(", ".join(f"{word} {cosine:.2f}" for word, cosine in near.models[name]) for name in names)]
        for near in report.neighbours
    ]
    yield from _table(["word", *names], found)


def _curves(report: Report) -> Iterator[str]:
    rows = [
        [run.run, figure, *_ends(points)]
        for run in report.curves
        for kind in (run.train, run.evaluation)
        for figure, points in kind.items()
    ]
    if rows:
        yield from ["## Curves", ""]
        yield from _table(["run", "figure", "first", "lowest", "highest", "last"], rows)


def _ends(points: Points) -> list[str]:
    values = [value for _, value in points]
    return [short(value) for value in (values[0], min(values), max(values), values[-1])]


def _made(report: Report) -> Iterator[str]:
    yield from ["## How it was made", ""]
    for made in report.made:
        yield from [f"{made.run}: {made.sentence} Settings that are not at their defaults:", "", "```"]
        yield from (f"{key} = {value!r}" for key, value in made.changed.items())
        yield from ["```", ""]
    yield from ["This page:", "", "```bash", report.command, "```", ""]
    yield ", ".join(f"{name} {version}" for name, version in report.versions.items()) + "."
