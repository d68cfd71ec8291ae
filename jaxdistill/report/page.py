"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources

from jaxdistill.report.charts import Line, calibration_chart, dot_chart, heat_map, line_chart
from jaxdistill.report.contents import (
    GROUPS,
    Curves,
    Example,
    Figure,
    Made,
    Near,
    Portrait,
    Report,
    headline,
    short,
    written,
)

_COLOURS = 6  # styles c0 to c5 of the page
_TEACHERS = "teacher_"  # begins the names of the teacher's own figures in a run's records
_FIRST = ("loss",)
_RATES = ("learning_rate", "tokens_per_s", "grad_norm", "input_wait")
_NAMES = {
    "loss": "Loss, all terms",
    "ce": "Divergence from the teacher (ce)",
    "mlm": "Masked words (mlm)",
    "clm": "Next words (clm)",
    "cos": "Last hidden states (cos)",
    "mse": "Logits (mse)",
    "learning_rate": "Learning rate",
    "tokens_per_s": "Tokens per second",
    "grad_norm": "Norm of the gradient",
    "input_wait": "Share of time spent waiting for text",
    "perplexity": "Perplexity",
    "kl": "KL from the teacher",
    "top1": "Agreement at 1",
    "top5": "Agreement at 5",
    "mlm_loss": "Loss on masked words",
    "clm_loss": "Loss on next words",
    "mlm_accuracy": "Right words",
    "clm_accuracy": "Right words",
}
_BANDS = ("frequent", "common", "rare")


def page(report: Report) -> str:
    """The whole file."""
    style = resources.files("jaxdistill.report").joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        _section("Side by side", _side_by_side(report)),
        _section("Examples", _examples(report)),
        _section("Nearest words", _neighbours(report)),
        _section("Training", _training(report)),
        _section("Evaluation over time", _evaluation(report)),
        _section("A closer look", _closer(report)),
        _section("How it was made", _how(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(report)}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, parts: Iterable[str]) -> str:
    inner = "\n".join(parts)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>\n" if inner else ""


def _head(report: Report) -> str:
    lead = headline(report)
    return (
        f'<header>\n<p class="over">Distillation report</p>\n<h1>{escape(report.title)}</h1>\n'
        + (f'<p class="lead">{escape(lead)}</p>\n' if lead else "")
        + f'<p class="muted">Measured on {_code(report.text)}. {escape(report.when)}.</p>\n'
        + _tiles(report)
        + "</header>"
    )


def _tiles(report: Report) -> str:
    """The four figures that a reader asks for first, of the first student beside its teacher."""
    if not report.has_teacher or len(report.portraits) < 2:
        return ""
    teacher, student = (portrait.figures for portrait in report.portraits[:2])
    shown = (("parameters", "count"), ("latency", "ms"), ("perplexity", "number"))
    tiles = [
        (_figure(name).label, written(student[name], unit), f"teacher {written(teacher[name], unit)}")
        for name, unit in shown
    ]
    tiles.append(("Agreement at 1", written(student["top1"], "share"), f"at 5: {written(student['top5'], 'share')}"))
    inner = "".join(
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="value">{escape(value)}</span>'
        f'<span class="muted">{escape(note)}</span></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{inner}</div>\n'


def _figure(name: str) -> Figure:
    return next(figures[name] for figures in GROUPS.values() if name in figures)


def _code(text: str) -> str:
    """Escaped, with `this` as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _styles(report: Report) -> dict[str, str]:
    """The colour of each model and run: that of the teacher is ink, as it is what all others are measured by."""
    names = [one.name for one in report.portraits[report.has_teacher :]] + [run.run for run in report.curves]
    return {"teacher": "teacher"} | {name: f"c{i % _COLOURS}" for i, name in enumerate(dict.fromkeys(names))}


def _legend(names: Iterable[str], styles: Mapping[str, str]) -> str:
    keys = "".join(f'<span class="key"><i class="{styles[name]}"></i>{escape(name)}</span>' for name in names)
    return f'<p class="legend">{keys}</p>'


def _side_by_side(report: Report) -> Iterator[str]:
    if not report.portraits:
        return
    styles = _styles(report)
    head = "".join(
        f'<th scope="col"><span class="key"><i class="{styles[one.name]}"></i>{escape(one.name)}</span>'
        f'<span class="muted">{escape(one.what)}</span></th>'
        for one in report.portraits
    )
    yield f'<div class="scroll"><table class="figures">\n<thead><tr><td></td>{head}</tr></thead>'
    for group, figures in GROUPS.items():
        rows = [_row(report, name, figure) for name, figure in figures.items()]
        if any(rows):
            wide = len(report.portraits) + 1
            yield f'<tbody><tr class="group"><th colspan="{wide}" scope="rowgroup">{escape(group)}</th></tr>'
            yield f"{''.join(rows)}</tbody>"
    yield "</table></div>"
    beside = " Small figures are relative to the teacher;" if report.has_teacher else ""
    best = f"{beside} the best student of a row is bold." if len(report.made) > 1 else beside.replace(";", ".")
    yield f'<p class="muted">Latency and memory: {escape(report.measured_how)}.{best}</p>'
    if report.has_teacher and len(report.portraits) == 2:
        yield (
            '<p class="muted">There is no baseline here. To see what the teacher adds, train the same student with '
            "<code>--config.teacher.name=</code> and name its run beside this one.</p>"
        )


def _row(report: Report, name: str, figure: Figure) -> str:
    values = [portrait.figures.get(name) for portrait in report.portraits]
    if all(value is None for value in values):
        return ""
    first = 1 if report.has_teacher else 0
    students = [value for value in values[first:] if value is not None]
    best = None
    if figure.lower_is_better is not None and len(set(students)) > 1:
        best = min(students) if figure.lower_is_better else max(students)
    cells = []
    for i, value in enumerate(values):
        if value is None:
            cells.append('<td class="none">&ndash;</td>')
            continue
        bold = " class='best'" if i >= first and value == best else ""
        teacher = values[0] if report.has_teacher and i and figure.beside else None
        ratio = f"<small>&times; {short(value / teacher)}</small>" if teacher else ""
        cells.append(f"<td{bold}><span>{escape(written(value, figure.unit))}</span>{ratio}</td>")
    note = f"<small>{escape(figure.note)}</small>" if figure.note else ""
    return f'<tr><th scope="row">{escape(figure.label)}{note}</th>{"".join(cells)}</tr>\n'


def _examples(report: Report) -> Iterator[str]:
    styles = _styles(report)
    if report.examples:
        yield _legend([one.name for one in report.portraits], styles)
        if report.has_teacher:
            yield '<p class="muted"><mark>Marked</mark>: what a student says and its teacher does not.</p>'
    for example in report.examples:
        yield f'<article class="example"><p class="prompt">{_prompt(example)}</p>'
        kind = "texts" if example.texts else "words"
        yield f'<div class="answers {kind}">{"".join(_answers(example, styles))}</div></article>'


def _prompt(example: Example) -> str:
    prompt = escape(example.prompt).replace("[MASK]", '<span class="mask">[MASK]</span>')
    if not example.expected:
        return prompt
    return f'{prompt} <span class="truth">the text: <b>{escape(example.expected)}</b></span>'


def _answers(example: Example, styles: Mapping[str, str]) -> Iterator[str]:
    of_teacher = {word for word, _ in example.words.get("teacher", ())}
    most = max((p for words in example.words.values() for _, p in words), default=1.0)
    for name, words in example.words.items():
        rows = "".join(
            f'<li><span class="bar {styles[name]}" style="width:{100 * p / max(most, 1e-9):.0f}%"></span>'
            f"<span>{_marked(word, new=bool(of_teacher) and word not in of_teacher, right=word == example.expected)}"
            f"</span><small>{p:.0%}</small></li>"
            for word, p in words
        )
        yield f'<div><p class="who"><i class="{styles[name]}"></i>{escape(name)}</p><ol>{rows}</ol></div>'
    for name, text in example.texts.items():
        shown = escape(text) if name == "teacher" else _unlike(example.texts.get("teacher"), text)
        yield f'<div><p class="who"><i class="{styles[name]}"></i>{escape(name)}</p><p class="text">{shown}</p></div>'


def _marked(word: str, *, new: bool, right: bool) -> str:
    text = f"<b>{escape(word)}</b>" if right else escape(word)
    return f"<mark>{text}</mark>" if new else text


def _unlike(teachers: str | None, text: str) -> str:
    """A text with those words marked that the teacher's does not have in their place."""
    if teachers is None:
        return escape(text)
    words, others = text.split(), teachers.split()
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        piece = escape(" ".join(words[start:end]))
        if piece:
            parts.append(piece if kind == "equal" else f"<mark>{piece}</mark>")
    return " ".join(parts)


def _neighbours(report: Report) -> Iterator[str]:
    if not report.neighbours:
        return
    styles = _styles(report)
    yield '<p class="muted">The words whose input embeddings are the most alike, with their cosines. '
    yield "<mark>Marked</mark>: near in a student and not in its teacher.</p>" if report.has_teacher else "</p>"
    head = "".join(
        f'<th scope="col"><span class="key"><i class="{styles[one.name]}"></i>{escape(one.name)}</span></th>'
        for one in report.portraits
    )
    yield f'<div class="scroll"><table class="figures words">\n<thead><tr><td></td>{head}</tr></thead><tbody>'
    for near in report.neighbours:
        cells = "".join(f"<td>{_near(near, one.name)}</td>" for one in report.portraits)
        yield f'<tr><th scope="row">{escape(near.word)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _near(near: Near, name: str) -> str:
    of_teacher = {word for word, _ in near.models.get("teacher", near.models[name])}
    return "".join(
        f"<span>{_marked(word, new=word not in of_teacher, right=False)} <small>{cosine:.2f}</small></span>"
        for word, cosine in near.models[name]
    )


def _training(report: Report) -> Iterator[str]:
    names = _figures_of(run.train for run in report.curves)
    terms = [name for name in names if name not in (*_FIRST, *_RATES)]
    ordered = [name for name in (*_FIRST, *terms, *_RATES) if name in names]
    yield from _panels(report, ordered, of="train")


def _evaluation(report: Report) -> Iterator[str]:
    names = _figures_of(run.evaluation for run in report.curves)
    yield from _panels(report, [name for name in names if not name.startswith(_TEACHERS)], of="evaluation")


def _figures_of(runs: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run))


def _panels(report: Report, names: Sequence[str], *, of: str) -> Iterator[str]:
    """A chart for each figure, with a line for each run; the teacher's own figure is a line across."""
    if not names:
        return
    styles, taught = _styles(report), False
    panels = []
    for name in names:
        lines = []
        for run in report.curves:
            points = getattr(run, of).get(name, ())
            teachers = _of_teacher(run, name) if of == "evaluation" else ()
            if teachers and not any(line.name == "teacher" for line in lines):
                lines.append(Line("teacher", "teacher", teachers))
                taught = True
            lines.append(Line(run.run, styles[run.run], points))
        chart = line_chart(lines, label=_name(name), may_be_log=name not in _RATES)
        if chart:
            panels.append(f"<figure><figcaption>{escape(_name(name))}</figcaption>{chart}</figure>")
    yield _legend([*(["teacher"] if taught else []), *(run.run for run in report.curves)], styles)
    yield f'<div class="panels">{"".join(panels)}</div>'
    yield '<p class="muted">Over the steps of training.</p>'


def _of_teacher(run: Curves, name: str) -> Sequence[tuple[float, float]]:
    return run.evaluation.get(f"{_TEACHERS}{name}", ())


def _name(name: str) -> str:
    figure, _, part = name.partition("/")
    known = _NAMES.get(figure, figure.replace("_", " "))
    return f"{known}, {part}" if part else known


def _closer(report: Report) -> Iterator[str]:
    if not report.portraits:
        return
    styles = _styles(report)
    panels = [
        _panel(
            "Calibration",
            "How often the likeliest word is right, over how sure the model is of it. On the dashed line it is as "
            "often right as it is sure; larger dots hold more tokens.",
            calibration_chart([(one.name, styles[one.name], one.calibration) for one in report.portraits]),
        )
    ]
    if rows := _rows_of_bands(report.portraits, styles):
        panels.append(
            _panel(
                "Rare and frequent words",
                "Perplexity of the words that make half of the text, the next 40 %, and the last 10 %.",
                dot_chart(rows),
            )
        )
    for one in report.portraits:
        if one.similarity is not None:
            panels.append(
                _panel(
                    f"Layers of {one.name} and of its teacher",
                    "How alike their hidden states are (CKA): 1 is alike but for rotation and scale.",
                    heat_map(one.similarity, across="teacher", down=one.name),
                )
            )
    yield _legend([one.name for one in report.portraits], styles)
    yield f'<div class="panels">{"".join(panels)}</div>'


def _rows_of_bands(
    portraits: Sequence[Portrait], styles: Mapping[str, str]
) -> list[tuple[str, list[tuple[str, str, float]]]]:
    rows = []
    for band in _BANDS:
        dots = [(one.name, styles[one.name], one.figures[band]) for one in portraits if band in one.figures]
        if dots:
            rows.append((band.capitalize(), dots))
    return rows


def _panel(title: str, note: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{chart}</figure>"


def _how(report: Report) -> Iterator[str]:
    for made in report.made:
        yield _recipe(made)
    yield f"<h3>This page</h3><pre>{escape(report.command)}</pre>"
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(one)}</dd></div>" for name, one in report.versions.items())
    yield f'<dl class="versions">{"".join(items)}</dl>'


def _recipe(made: Made) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th><td><code>{escape(repr(value))}</code></td></tr>'
        for key, value in made.changed.items()
    )
    return (
        f"<h3>{escape(made.run)}</h3><p>{_code(made.sentence)} These settings are not at their defaults:</p>"
        f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'
        f"<details><summary>All settings of {escape(made.run)}</summary><pre>{escape(made.settings)}</pre></details>"
    )
