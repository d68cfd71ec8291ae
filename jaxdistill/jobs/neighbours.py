"""The nearest words of some words in the models of a run, side by side, or in models that a user names."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxdistill.errors import UserError
from jaxdistill.evaluate.neighbours import Neighbours, nearest_words
from jaxdistill.jobs.generate import writer_named
from jaxdistill.run import folder as folders

Report = Callable[[str], None]


class Table(NamedTuple):
    """Nearest words by model and by word."""

    words: Sequence[str]
    models: dict[str, list[Neighbours]]  # by role in a run, or by name: for each of `words`

    def lines(self) -> Iterator[str]:
        """A row for each word, a column for each model."""
        rows = [["word", *self.models]]
        for i, word in enumerate(self.words):
            found = [", ".join(f"{near} ({cosine:.4f})" for near, cosine in of[i]) for of in self.models.values()]
            rows.append([word, *found])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    def values(self) -> dict[str, dict[str, list[dict[str, str | float]]]]:
        """For a script: model -> word -> [{word, cosine}, ...]."""
        return {
            name: {
                word: [{"word": near, "cosine": cosine} for near, cosine in found]
                for word, found in zip(self.words, of, strict=True)
            }
            for name, of in self.models.items()
        }


def models_of_run(workdir: Path, base: str) -> dict[str, str]:
    """The models to compare for a run, by role: its teacher, where it has one, its student, and a base model.

    Args:
      base: folder or name of the base model; "" = none.

    Raises:
      UserError: `workdir` is no run folder.
    """
    config = folders.read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    named = {"teacher": config["teacher"]["name"], "student": str(workdir), "base": base}
    return {role: name for role, name in named.items() if name}


def compare_neighbours(
    models: dict[str, str], words: Sequence[str], *, top: int, step: str, allow_pickle: bool, report: Report
) -> Table:
    """The table for models by role or name, each read, measured and dropped in turn.

    Args:
      step: of the checkpoint of the student, as for `writer_named`.

    Raises:
      UserError: a model cannot be read, or its tokenizer does not know a word.
    """
    if top < 1:
        raise UserError(f"--top {top} must be at least 1")
    found = {}
    for role, name in models.items():
        writer = writer_named(
            name,
            step=step if role == "student" else "last",
            revision="",
            allow_pickle=allow_pickle,
            report=report,
        )
        found[role] = nearest_words(writer.model, writer.load(), writer.tokenizer, words, top=top)
    return Table(words, found)
