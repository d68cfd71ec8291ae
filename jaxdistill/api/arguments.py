"""Checks of the arguments that a Python program gives, before a model is read."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from os import PathLike
from typing import Any

from jaxdistill.errors import UserError


def name_of(argument: str, given: Any) -> str:
    """A name or path as a text.

    Raises:
      UserError: it is neither.
    """
    if not isinstance(given, str | PathLike):
        raise UserError(f"{argument} is {_told(given)}; give a name or a path")
    return str(given)


def texts_of(argument: str, given: Any) -> list[str]:
    """One text, or several, as a list.

    Raises:
      UserError: there is something else.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise UserError(f"{argument} is {_told(given)}; give a text, or a list of texts")
    listed = list(given)
    if strange := [one for one in listed if not isinstance(one, str)]:
        raise UserError(f"{argument} holds {_told(strange[0])}, which is no text")
    return listed


def whole(argument: str, given: Any) -> int:
    """A whole number, of Python or NumPy.

    Raises:
      UserError: it is none.
    """
    with suppress(TypeError):
        if not isinstance(given, bool):
            return operator.index(given)
    raise UserError(f"{argument} is {_told(given)}; it must be a whole number")


def at_least_one(argument: str, given: Any) -> int:
    """A count.

    Raises:
      UserError: it is no whole number, or below 1.
    """
    if (count := whole(argument, given)) < 1:
        raise UserError(f"{argument} is {count}; it must be at least 1")
    return count


def number(argument: str, given: Any) -> float:
    """A number, of Python or NumPy.

    Raises:
      UserError: it is none.
    """
    with suppress(TypeError, ValueError):
        if not isinstance(given, bool | str):
            return float(given)
    raise UserError(f"{argument} is {_told(given)}; it must be a number")


def check_flag(argument: str, given: Any) -> None:
    """Raises UserError for a value that is neither True nor False: "no" would be taken as true."""
    if not isinstance(given, bool):
        raise UserError(f"{argument} is {_told(given)}; it must be True or False")


def check_function(argument: str, given: Any, *called_with: str) -> None:
    """Checks that a function can be called with as many values as there are words that describe them.

    Raises:
      UserError: it is no function, or takes other values.
    """
    if not callable(given):
        raise UserError(f"{argument} is {_told(given)}; give a function")
    if not _takes(given, called_with):
        raise UserError(f"{argument} cannot be called with {len(called_with)} value(s), {' and '.join(called_with)}")


def _told(given: Any) -> str:
    """A value in a message of one line; the type of what is long, such as a data frame."""
    text = repr(given)
    return text if len(text) <= 80 and text.isprintable() else f"of type {type(given).__name__}"


def _takes(function: Callable[..., Any], values: Iterable[Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are written in C have no signature
        return True
    try:
        signature.bind(*values)
    except TypeError:
        return False
    return True
