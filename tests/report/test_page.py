"""The page of a report: whole in itself, true to its values, and safe against what texts and names hold."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import grids
import numpy as np
import pytest

from jaxdistill.report import charts
from jaxdistill.report.contents import Bin, Curves, Example, Made, Near, Portrait, Report, headline, written
from jaxdistill.report.markdown import markdown
from jaxdistill.report.page import page

HOSTILE = '<script>alert(1)</script> & "quotes" | pipes'


def portrait(name: str, **figures: float) -> Portrait:
    own = {
        "parameters": 2e6,
        "bytes": 8e6,
        "latency": 4.0,
        "memory": 9e6,
        "peak": 7e6,
        "perplexity": 20.0,
        "rare": 300.0,
        **figures,
    }
    bins = [Bin(0.1, 0.2, 0.7), Bin(0.9, 0.8, 0.3)]
    return Portrait(name, "bert, 2 layers of width 16", own, bins, None if name == "teacher" else np.eye(3))


def report(*, name: str = "student", examples: Sequence[Example] = (), teacher: bool = True) -> Report:
    steps = [(10.0 * i, 5.0 / (i + 1)) for i in range(30)]
    curves = Curves(
        name,
        {"loss": steps, "learning_rate": steps},
        {"perplexity": steps, "teacher_perplexity": [(0, 2.0), (290, 2.0)]},
    )
    made = Made(name, f"A student distilled from `{HOSTILE}`.", {"teacher.name": HOSTILE}, "{}")
    students = [portrait(name, parameters=1e6, top1=0.75, top5=0.9, kl=0.3)]
    return Report(
        title=name,
        text=f"all rows of `{HOSTILE}`",
        when="1 January 2026",
        command="jaxdistill report runs/student",
        versions={"jax": "0.10.0"},
        curves=[curves],
        made=[made],
        portraits=[portrait("teacher"), *students] if teacher else students,
        has_teacher=teacher,
        examples=examples,
        neighbours=[Near(HOSTILE, {one: [("cat", 0.9), (one, 0.123)] for one in (*["teacher"] * teacher, name)})],
        measured_how="one row of 128 tokens on one cpu",
    )


class Balance(HTMLParser):
    """Checks that every element is closed, and keeps what a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.fetched += [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_else_and_runs_nothing() -> None:
    examples = [
        Example(HOSTILE, HOSTILE, words={"teacher": [(HOSTILE, 0.5)], HOSTILE: [(HOSTILE, 0.5), ("b", 0.1)]}),
        Example(HOSTILE, "", texts={"teacher": HOSTILE, HOSTILE: f"other {HOSTILE}"}),
    ]
    text = page(report(name=HOSTILE, examples=examples))
    assert Balance(text).fetched == []
    assert "url(" not in text and "@import" not in text
    assert "<script" not in text and escape("<script>") in text


@pytest.mark.parametrize("teacher", [True, False])
def test_every_figure_stands_on_page_and_in_markdown(teacher: bool) -> None:
    made = report(teacher=teacher)
    for text in (unescape(page(made)), markdown(made)):
        for part in (
            "1 M",
            "8 MB",
            "7 MB",
            "9 MB",
            "4 ms",
            "75.0 %",
            "0.3",
            "300",
            "jaxdistill report runs/student",
            "jax",
        ):
            assert part in text, part


def test_the_headline_compares_the_first_student_with_its_teacher() -> None:
    assert headline(report()) == (
        "student has 50% of its teacher's parameters and takes 100% of its time. Its likeliest word is the teacher's "
        "for 75% of the tokens, and its perplexity is 20 where the teacher's is 20."
    )
    assert headline(report(teacher=False)) == ""


def test_what_a_student_says_and_its_teacher_does_not_is_marked() -> None:
    words = Example("a [MASK]", "dog", words={"teacher": [("cat", 0.6)], "student": [("cat", 0.5), ("dog", 0.3)]})
    texts = Example("Once", "", texts={"teacher": "a cat ran away", "student": "a dog ran away"})
    made = report(examples=[words, texts])._replace(neighbours=[])
    assert re.findall("<mark>(.*?)</mark>", page(made)) == ["Marked", "<b>dog</b>", "dog"]  # the true word is bold


def test_nearest_words_of_a_student_that_its_teacher_has_not_are_marked() -> None:
    text = page(report())
    section = text.partition("<h2>Nearest words</h2>")[2].partition("</section>")[0]
    assert re.findall("<mark>(.*?)</mark>", section) == ["Marked", "student"]
    assert escape(HOSTILE) in section and section.count("cat <small>0.90</small>") == 2
    assert "cat 0.90, student 0.12" in markdown(report())
    assert "Nearest words" not in page(report()._replace(neighbours=[]))


def test_the_best_student_of_a_row_is_bold() -> None:
    same = {"top1": 0.5, "top5": 0.5}
    better, worse = (
        portrait("a", perplexity=10.0, accuracy=0.5, **same),
        portrait("b", perplexity=12.0, accuracy=0.4, **same),
    )
    text = page(report()._replace(portraits=[portrait("teacher"), better, worse], neighbours=[]))
    rows = {row: re.findall("<td[^>]*class='best'><span>(.*?)</span>", row) for row in text.split("<tr>")}
    best = {re.findall(r"row\">(.*?)<", row)[0]: values for row, values in rows.items() if values}
    assert best == {"Perplexity": ["10"], "Right words": ["50.0 %"]}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (66_362_880, "count", "66.4 M"),
        (8_030_261_248, "count", "8.03 B"),
        (265e6, "bytes", "265 MB"),
        (1.5e9, "bytes", "1.5 GB"),
        (0.4567, "share", "45.7 %"),
        (2.345, "ms", "2.35 ms"),
        (2345, "ms", "2.35 s"),
        (1690.2, "number", "1690"),
        (5e-05, "number", "5.0e-5"),
        (66333, "number", "66.3 k"),
        (0, "number", "0"),
    ],
)
def test_values_are_written_for_people(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_a_line_is_drawn_where_its_values_are() -> None:
    """The first point at the left end, the lowest value below the highest, and steps in proportion."""
    chart = charts.line_chart([charts.Line("run", "c0", [(0, 1.0), (10, 3.0), (30, 2.0)])], label="loss")
    path = re.search(r'class="line c0" d="([^"]*)"', chart)
    assert path
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", path[1])[1:]]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx((x2 - x0) / 3, abs=0.2)
    assert y1 < y2 < y0 and y2 - y1 == pytest.approx(y0 - y2, abs=0.2)


def test_a_wide_range_is_drawn_on_a_logarithmic_axis() -> None:
    points = [(0, 1000.0), (1, 100.0), (2, 10.0)]
    heights = {}
    for may_be_log in (True, False):
        chart = charts.line_chart([charts.Line("r", "c0", points)], label="p", may_be_log=may_be_log)
        path = re.search(r'class="line c0" d="([^"]*)"', chart)
        assert path
        heights[may_be_log] = [float(place.split()[1]) for place in re.split("[ML]", path[1])[1:]]
        assert ("logarithmic" in chart) == may_be_log
    a, b, c = heights[True]
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert heights[False][1] - heights[False][0] > 9 * (heights[False][2] - heights[False][1])


@pytest.mark.parametrize("points", [[], [(5, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (9, 0.0)], [(0, -3.0), (1, 1e9)]])
def test_odd_curves_are_drawn(points: list[tuple[float, float]]) -> None:
    chart = charts.line_chart([charts.Line("run", "c0", points)], label="loss")
    assert (chart == "") == (points == []) and "nan" not in chart


def test_a_long_curve_is_thinned_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    thinned = charts._thinned(points)
    assert len(thinned) == 200 and {value for _, value in thinned} == {0.5} and thinned[-1][0] == 9999


def test_markdown_keeps_tables_whole() -> None:
    text = markdown(report(name=HOSTILE, examples=[Example(f"a\n{HOSTILE}", "", texts={"teacher": "b\nc"})]))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    heads = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(heads) == {4, 7}  # side by side; curves


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), grids.covering([390, 1180], [False, True]))
def test_a_browser_shows_the_page_without_overflow(dark: bool, width: int, tmp_path: Path) -> None:
    """In a frame of that width, whose measures a script beside it reads."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not on PATH")
    words = {"teacher": [("cat", 0.6)], "student": [("dog", 0.5)]}
    text = page(report(examples=[Example("a [MASK] " * 30, "dog", words=words)]))
    script = (
        "const d = frame.contentDocument, e = d.documentElement, b = d.defaultView.getComputedStyle(d.body);"
        "document.title = [e.scrollWidth, e.clientWidth, b.backgroundColor, d.querySelectorAll('svg').length].join('/')"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe id="frame" style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{escape(text)}" onload="{escape(script)}"></iframe>'
    )
    shown = chromium("--dump-dom", "--hide-scrollbars", *["--force-dark-mode"] * dark, frame.as_uri(), folder=tmp_path)
    title = re.search("<title>(.*?)</title>", shown)
    assert title
    needed, given, colour, pictures = title[1].split("/")
    assert int(needed) == int(given) == width
    assert int(pictures) == 6
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert brightness < 60 if dark else brightness > 200


@pytest.mark.slow
def test_a_browser_prints_the_page_to_pdf(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not on PATH")
    source, out = tmp_path / "report.html", tmp_path / "report.pdf"
    source.write_text(page(report()))
    chromium(f"--print-to-pdf={out}", source.as_uri(), folder=tmp_path)
    pages = out.read_bytes()
    assert pages.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", pages)) <= 6


def chromium(*arguments: str, folder: Path) -> str:
    assert CHROMIUM
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *flags, profile, "--window-size=1300,1000", *arguments], capture_output=True, text=True, timeout=120
    )
    return done.stdout
