"""The documents: tables that a Markdown renderer shows as tables, and links to files that exist; what commands need is
said before them."""

import ast
import itertools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])


def prose(path: Path) -> list[str]:
    """The lines of a document, those of code blocks emptied."""
    lines, code = [], False
    for line in path.read_text().splitlines():
        code ^= line.lstrip().startswith("```")
        lines.append("" if code else line)
    return lines


def blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines) of every run of lines that begin with a bar."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.startswith("|"):
            block.append(line)
        elif block:
            yield number - len(block), block
            block = []


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_has_a_head_and_rows_of_one_width(path: Path) -> None:
    for number, table in blocks(prose(path)):
        where = f"{path.name} line {number}"
        assert len(table) > 2, f"{where}: a table needs a head, a rule and a row, without blank lines between them"
        assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", table[1]), f"{where}: the second line is no rule under a head"
        assert {cells(row) for row in table} == {cells(table[0])}, f"{where}: rows of other widths than the head's"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", "\n".join(prose(path))):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"


def rendered(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_renderer_shows_every_table(path: Path) -> None:
    tokens = rendered(path)
    assert sum(token.type == "table_open" for token in tokens) == sum(1 for _ in blocks(prose(path)))
    for before, token in itertools.pairwise(tokens):
        if before.type == "paragraph_open":
            lost = [line for line in token.content.splitlines() if line.startswith("|")]
            assert lost == [], f"{path.name} line {(token.map or [0])[0] + 1}: a row that is in no table"


def test_the_renderer_notices_a_table_that_a_blank_line_breaks(tmp_path: Path) -> None:
    broken = tmp_path / "broken.md"
    broken.write_text("| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n")
    with pytest.raises(AssertionError):
        test_a_renderer_shows_every_table(broken)


@pytest.mark.parametrize(
    ("section", "command", "need"),
    [
        ("Distil a BERT", "from transformers import pipeline", "pip install torch"),
        ("Distil a GPT-2", "configs/gpt2_finetune.py", "pip install -e '.[rouge]'"),
    ],
)
def test_what_commands_need_is_said_before_them(section: str, command: str, need: str) -> None:
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    prose_before, commands = text.split("```bash", 1)
    assert need in prose_before and command in commands.split("```")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run_how_long_it_takes_and_what_came_of_it(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert max(map(len, text.splitlines())) <= 120, "a command on two lines needs a raw docstring, for its backslash"
    assert f"configs/{path.name} " in text or f"python scripts/make_{path.stem.removesuffix('_teacher')}.py" in text
    time, result = (
        [" ".join(part.split()) for part in text.split("\n\n") if part.startswith(f"{word}: ")]
        for word in ("Time", "Result")
    )
    assert len(time) == len(result) == 1
    assert re.search(r"\b(minutes|hours?|seconds) on ", time[0])
    assert "docs/times.md" in time[0] or "tokens a second" in time[0], "a reader asks where a time comes from"
    assert re.search(r"nobody has run this recipe at|reaches a perplexity of \d", result[0])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_that_measures_rouge_says_what_that_needs(path: Path) -> None:
    recipe = runpy.run_path(str(path))
    if "rouge" in recipe["get_config"]().evaluate.metrics:
        assert "pip install 'jaxdistill[rouge]'" in recipe["__doc__"]
