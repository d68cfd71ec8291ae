"""Files are closed whatever has happened to them, and the first error is the one that is told."""

from collections.abc import Callable
from types import TracebackType


class Closing:
    """Calls functions when its block ends, the last one first, as contextlib.ExitStack does.

    On a disk that is full, closing a file fails as well: what a function raises does not replace the error of the
    block, nor keep other files open.
    """

    def __init__(self) -> None:
        self._functions: list[Callable[[], object]] = []

    def callback(self, function: Callable[[], object]) -> None:
        self._functions.append(function)

    def __enter__(self) -> "Closing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed: Exception | None = None
        for function in reversed(self._functions):
            try:
                function()
            except Exception as e:
                failed = failed or e
        if error is None and failed is not None:
            raise failed
