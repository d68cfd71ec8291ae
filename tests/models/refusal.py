"""The check that several tests make of an error message."""

from collections.abc import Callable

import pytest

from jaxdistill.errors import UserError


def refused(call: Callable[[], object], *parts: str) -> None:
    """`call` raises a UserError of one line that contains all parts."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
