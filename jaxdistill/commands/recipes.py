"""`jaxdistill recipes`: lists the recipes of the package, or shows one."""

import argparse
from collections.abc import Iterator
from typing import Any

from jaxdistill.console import LOADING, show, taking

HELP = "list the recipes of the package, or show one"
TAKES_CONFIG = False
LESS_MEMORY = "close other programs"
INTERRUPTED = "nothing was changed"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", help="recipe to show, such as bert_mlm")
    parser.add_argument("--json", action="store_true", help="print name, variants, file and explanation as JSON")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill.recipe import recipe_named, recipes

    found = [recipe_named(flags.name)] if flags.name else recipes()
    lines = _whole(found[0]) if flags.name else _listed(found)
    show(lines, [{**one._asdict(), "path": str(one.path)} for one in found], as_json=flags.json)


def _listed(found: list[Any]) -> Iterator[str]:
    for recipe in found:
        yield f"{recipe.name}{''.join(f' :{variant}' for variant in recipe.variants)}"
        yield f"    {recipe.explanation.splitlines()[0]}"
    yield ""
    yield "`jaxdistill recipes NAME` shows command, time and result of one; --config NAME, or NAME:VARIANT, runs it."


def _whole(recipe: Any) -> Iterator[str]:
    yield recipe.explanation
    yield ""
    yield f"variants: {', '.join(recipe.variants) or 'none'}"
    yield f"file, to copy and change: {recipe.path}"
