"""The exception for errors that a user can fix."""


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
