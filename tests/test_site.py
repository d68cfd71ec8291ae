"""The documentation site: it builds without a warning, its links lead somewhere, and no loss is missing."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from jaxdistill.losses.divergences import BY_WRITER, DIVERGENCES
from jaxdistill.losses.terms import TERMS

ROOT = Path(__file__).parents[1]


def test_every_loss_and_every_divergence_has_a_section() -> None:
    described = re.findall(r"^### `(\w+)`$", (ROOT / "docs" / "losses.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted([*TERMS, *DIVERGENCES, *BY_WRITER])


class Links(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        self.places |= {value for name, value in attrs if name in ("id", "name") and value}


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pages = {page: Links(page) for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 15
    lost = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme in ("https", "http", "data", "mailto"):
                continue
            target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (parts.fragment and parts.fragment not in pages[target].places):
                lost.append((page.relative_to(tmp_path).as_posix(), link))
    assert lost == []
    fetched = [link for found in pages.values() for link in found.links if "//fonts." in link or "cdn" in link]
    assert fetched == []
    assert "<math" in (tmp_path / "losses" / "index.html").read_text()
