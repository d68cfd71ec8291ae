"""What the documentation site needs beside docs/: the pages made from the code, formulas, and links out of docs/.

    pip install -e '.[docs]' && mkdocs serve

mkdocs calls these functions (`hooks` in mkdocs.yml). Formulas become MathML, which browsers draw without a script.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

import jaxdistill

ROOT = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from recipes, from CONTRIBUTING.md and from the package."""
    for name, text in (("recipes.md", recipes()), ("how-to-add.md", how_to_add()), ("api.md", api())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draws formulas, and names files of the repository that are no pages of the site."""
    parts = _CODE.split(_OUTSIDE.sub(r"\1 (`\2`)", markdown))
    return "".join(part if i % 2 else _FORMULA.sub(_drawn, part) for i, part in enumerate(parts))


def _drawn(found: re.Match[str]) -> str:
    if found[1]:
        return latex2mathml.converter.convert(found[1].strip(), display="block")
    # In a span, as Markdown takes a line that begins with <math> for a block of HTML.
    return f"<span>{latex2mathml.converter.convert(found[2].strip(), display='inline')}</span>"


def recipes() -> str:
    """A section for each recipe: its explanation, with its commands as code."""
    parts = [
        "# Recipes",
        "A recipe is run by its name: `jaxdistill train --config bert_mlm --workdir runs/bert`. Its variants are "
        "chosen after a colon, and any setting is changed by `--config.KEY=VALUE`. `jaxdistill recipes` lists them.",
    ]
    for path in sorted((ROOT / "configs").glob("*.py")):
        first, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")
        parts += [f"## {path.stem}", first, rest.strip("\n")]
    return "\n\n".join(parts) + "\n"


def how_to_add() -> str:
    """The chapter of CONTRIBUTING.md."""
    chapter = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## How to add\n")[2].partition("\n## ")[0]
    return f"# How to add\n{chapter.replace('### ', '## ')}"


def api() -> str:
    """Every name of `import jaxdistill`, with its signature and its explanation."""
    parts = ["# Python functions", "What `import jaxdistill` offers. [From Python](python.md) shows how it is used."]
    for name in jaxdistill.__all__:
        parts.append(_described(f"jaxdistill.{name}", getattr(jaxdistill, name), level="##"))
    return "\n\n".join(parts) + "\n"


def _described(name: str, thing: Any, *, level: str) -> str:
    parts = [f"{level} {name}"]
    if callable(thing) and not (isinstance(thing, type) and issubclass(thing, Exception)):
        parts.append(f"```python\n{name.split('.')[-1]}{inspect.signature(thing)}\n```")
    if text := inspect.getdoc(thing):
        parts.append(f"```text\n{text}\n```")
    if isinstance(thing, type):
        own = {key: value for key, value in vars(thing).items() if inspect.isfunction(value) and key[0] != "_"}
        parts += [_described(f"{name}.{key}", value, level=f"{level}#") for key, value in own.items()]
    return "\n\n".join(parts)
