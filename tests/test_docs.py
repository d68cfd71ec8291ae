"""The documents: tables that a Markdown renderer shows as tables, and links to files that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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
