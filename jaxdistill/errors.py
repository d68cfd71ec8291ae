"""The exception for errors that a user can fix."""


class UserError(Exception):
    """An error that the user can fix: one line that names the rule, the value and what to do.

    The entry points print the line without a traceback and exit with code 2.
    """
