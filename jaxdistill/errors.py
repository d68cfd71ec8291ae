"""The one exception a user can cause."""


class UserError(Exception):
    """Something the user can mend: one line that names the rule, the value and what to do.

    The entry points print it without a traceback and exit with code 2.
    """
