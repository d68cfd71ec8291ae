"""What the libraries underneath print and raise, cut down to the lines that help a user of this program."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' warnings, such as those that its Flax classes are deprecated and have no weights yet."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
