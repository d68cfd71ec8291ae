"""The exception for errors that a user can fix, and any error as one line."""

from collections.abc import Sequence

_LONGEST = 1_000  # letters of a line


class UserError(Exception):
    """An error that the user can fix: one line that names the rule, the value and what to do.

    The entry points print the line without a traceback and exit with code 2.
    """


class NotFiniteError(UserError):
    """A loss, a gradient or a figure is not finite: training has diverged, or a model's weights are damaged."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the name of the error's type where the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def place_in(keys: Sequence[str | int]) -> str:
    """A place in a file of nested values, as `weight_map.lm_head`, for a message: one line, whatever the keys hold."""
    return _short(".".join(map(str, keys))) or "the whole"


def explained(error: BaseException, *, less_memory: str) -> tuple[int, str]:
    """(exit code, one line) for whatever ended a command: 2 where the user can fix it, else 1.

    Args:
      less_memory: which values of the command to change where a device, or the machine, has not enough memory.
    """
    if isinstance(error, UserError):
        return 2, _short(str(error))
    if isinstance(error, MemoryError) or _is_full_device(error):
        where = "the machine" if isinstance(error, MemoryError) else "a device"
        return 2, _short(f"{where} has not enough memory ({first_line(error)}): {less_memory}")
    if isinstance(error, OSError) and error.errno is not None:
        # From a place that asked no `files.writing`: the operating system still says which file, and why.
        return 2, _short(f"{error.filename or 'the operating system refuses'}: {error.strerror}")
    return 1, _short(
        f"{type(error).__name__}: {first_line(error)} (no rule of jaxdistill foresaw this; JAXDISTILL_TRACEBACK=1 "
        "shows where it happened)"
    )


def _is_full_device(error: BaseException) -> bool:
    return type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)


def _short(text: str) -> str:
    """One line that a terminal shows, also of a message with values that have line ends or a million letters."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(line) <= _LONGEST:
        return line
    # Both ends, as the rule may stand before or after the value.
    return f"{line[: _LONGEST * 2 // 3]} … {line[-_LONGEST // 3 :]}"
