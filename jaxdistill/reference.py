"""The reference of all settings, docs/settings.md, made from their declarations.

python -m jaxdistill.reference > docs/settings.md
"""

from collections.abc import Iterable, Iterator

from pydantic.fields import FieldInfo

from jaxdistill.config import Config
from jaxdistill.knobs import Resumable, Section, resumable_of, rule_of, section_of

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
