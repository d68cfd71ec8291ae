"""The reference of all settings, docs/settings.md, made from their declarations.

python -m jaxdistill.reference > docs/settings.md
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.knobs import Resumable, Section, choices_of, resumable_of, rule_of, section_of

BAR = r"\|"  # a bar inside a cell of a table

_HEAD = """# Settings

<!-- Made by `python -m jaxdistill.reference > docs/settings.md`; change the sections, not this file. -->

Every setting of a run. A recipe (`configs/*.py`) starts from `jaxdistill.config.base()`, where every setting has its
default, and sets what it needs; `--config.SECTION.KEY=VALUE` on the command line comes after the recipe. The values
that a run used stand in `<workdir>/config.json`.

A run that is resumed must have the settings that it began with, because its parameters depend on them. Settings marked
with * may change. Settings marked with † name text or a model, and may change where the same content lies in another
place or under another name. Settings marked with ‡ may change where no step that was trained depends on the number of
all steps: with `optim.schedule=constant` after the warm-up, without `loss.end` and a linear
`student.layer_drop_schedule`.
"""

_MARKS: dict[Resumable, str] = {False: "", True: " *", "content": " †", "length": " ‡"}


class Setting(NamedTuple):
    """One setting, as its section declares it."""

    key: str
    default: Any
    rule: str  # what a value must keep to beside its type; "" = nothing
    explanation: str
    resumable: Resumable
    choices: tuple[str, ...]  # the texts that it, or each item of it, must be one of; () = any value of the type


def settings(word: str = "") -> list[Setting]:
    """The settings whose key or explanation holds a word, in any case; all of them for "".

    Raises:
      UserError: there is none; names the nearest keys.
    """
    found = [setting for setting in _all() if word.lower() in f"{setting.key} {setting.explanation}".lower()]
    if not found:
        keys = [setting.key for setting in _all()]
        tails = {key.rpartition(".")[-1]: key for key in keys}
        near = difflib.get_close_matches(word, keys, n=3) + difflib.get_close_matches(word, tails, n=3)
        hint = f"; the nearest are {', '.join(dict.fromkeys(tails.get(key, key) for key in near))}" if near else ""
        raise UserError(f"no setting has {word!r} in its name or explanation{hint}")
    return found


def _all() -> Iterator[Setting]:
    for name, field in Config.model_fields.items():
        section = section_of(field)
        for key, knob in section.model_fields.items() if section else [(name, field)]:
            dotted = f"{name}.{key}" if section else name
            yield Setting(
                dotted, knob.default, rule_of(knob), knob.description or "", resumable_of(knob), choices_of(knob)
            )


def settings_reference() -> str:
    """docs/settings.md: for each section its explanation, then a table of its knobs in the order of declaration."""
    sections = [(name, section_of(field)) for name, field in Config.model_fields.items()]
    own = [(name, field) for name, field in Config.model_fields.items() if section_of(field) is None]
    tables = [_table("", own), *(_section(name, section) for name, section in sections if section)]
    return "\n".join([_HEAD, *tables])


def _section(name: str, section: type[Section]) -> str:
    explanation = " ".join((section.__doc__ or "").split())
    return f"## {name}\n\n{explanation}\n\n{_table(f'{name}.', section.model_fields.items())}"


def _table(prefix: str, knobs: Iterable[tuple[str, FieldInfo]]) -> str:
    return "\n".join(["| key | default | rule | explanation |", "|---|---|---|---|", *_rows(prefix, knobs), ""])


def _rows(prefix: str, knobs: Iterable[tuple[str, FieldInfo]]) -> Iterator[str]:
    for name, field in knobs:
        rule = rule_of(field).removeprefix("must be ").removeprefix("must lie ")
        cells = (
            f"`{prefix}{name}`{_MARKS[resumable_of(field)]}",
            f"`{field.default!r}`",
            rule,
            field.description or "",
        )
        yield f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


if __name__ == "__main__":
    print(settings_reference(), end="")
