"""Text that a Python program holds in memory, as a file that a run can read, prepare and find again."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.files import write_text, writing

# A path, as data.path takes it; or texts, pairs (prompt, completion), or rows with columns: a list, a series or frame
# of pandas, a datasets.Dataset, or any other iterable.
Files = dict[Path, str]
Text = str | PathLike[str] | Iterable[Any]
PROMPT, TEXT = "prompt", "text"  # the columns of the file


def settings_of(
    text: Text | None, *, held_out: Text | None, column: str, prompt_column: str, folder: Path
) -> tuple[dict[str, Any], Files]:
    """(settings by dotted key that name this text, content of the files in `folder` that text in memory needs).

    The name of a file is a hash of its content, so that no other run's text is written over, and a run that is resumed
    with the same text finds the same file.

    Raises:
      UserError: something in it is not a text.
    """
    if text is None:
        if held_out is not None:
            raise UserError("held_out is given without text; name both")
        return {}, {}
    if isinstance(text, str | PathLike):
        if held_out is not None and not isinstance(held_out, str | PathLike):
            raise UserError("text names a file, and held_out is text in memory; give both in the same way")
        return {"data.path": str(text), **({} if held_out is None else {"data.eval_path": str(held_out)})}, {}
    if isinstance(held_out, str | PathLike):
        raise UserError("held_out names a file, and text is text in memory; give both in the same way")
    lines, has_prompts = _lines(text, "text", column=column, prompt_column=prompt_column)
    path = _path(folder, lines)
    settings = {
        "data.source": "jsonl",
        "data.path": str(path),
        "data.column": TEXT,
        "data.prompt_column": PROMPT if has_prompts else "",
        "data.prepared": "",
    }
    files = {path: lines}
    if held_out is not None:
        others, also = _lines(held_out, "held_out", column=column, prompt_column=prompt_column)
        if also != has_prompts:
            raise UserError("text and held_out must both be texts, or both pairs (prompt, completion)")
        settings["data.eval_path"] = str(_path(folder, others))
        files[_path(folder, others)] = others
    return settings, files


def write(files: Files) -> None:
    """Writes the files of `settings_of` that are not there yet."""
    for path, lines in files.items():
        if not path.exists():
            with writing(path):
                write_text(path, lines)


def _path(folder: Path, lines: str) -> Path:
    return folder / f"{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl"


def _lines(text: Iterable[Any], name: str, *, column: str, prompt_column: str) -> tuple[str, bool]:
    """(JSON lines, whether they are prompts and completions)."""
    rows = list(_rows(text, name, column=column, prompt_column=prompt_column))
    if not rows:
        raise UserError(f"{name} is empty; give at least one text")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise UserError(f"{name} holds both texts and pairs (prompt, completion); give one kind")
    names = (PROMPT, TEXT)[-widths.pop() :]
    lines = "".join(f"{json.dumps(dict(zip(names, row, strict=True)))}\n" for row in rows)
    return lines, len(names) == 2


def _rows(text: Any, name: str, *, column: str, prompt_column: str) -> Iterator[tuple[str, ...]]:
    columns = (prompt_column, column) if prompt_column else (column,)
    if isinstance(text, Mapping):
        raise UserError(f"{name} is a {type(text).__name__} with {', '.join(map(str, text))}; give one of its values")
    if not hasattr(text, "__iter__"):
        raise UserError(f"{name} is of type {type(text).__name__}; give a path, or texts: a list, a series or a frame")
    if (names := getattr(text, "column_names", getattr(text, "columns", None))) is not None:
        if missing := [one for one in columns if one not in list(names)]:
            key = "prompt_column" if prompt_column and missing[0] == prompt_column else "column"
            raise UserError(f"{name} has no column {missing[0]!r}; it has {', '.join(map(str, names))}; set {key}")
        if hasattr(text, "itertuples"):  # a frame of pandas, which iterates over the names of its columns
            text = zip(*(text[one] for one in columns), strict=True)
    for number, row in enumerate(text):
        if isinstance(row, Mapping):
            row = tuple(row.get(one) for one in columns)
        values: tuple[Any, ...] = tuple(row) if isinstance(row, list | tuple) else (row,)
        if len(values) > 2 or not all(isinstance(value, str) for value in values):
            raise UserError(
                f"{name}[{number}] is {_shown(row)}; it must be a text, or a pair (prompt, completion): "
                "leave out rows without text"
            )
        yield values


def _shown(value: Any) -> str:
    text = repr(value)
    return "".join(itertools.islice(text, 60)) + ("…" if len(text) > 60 else "")
