"""The one exception a user's mistake raises: commands print it on one line and leave with exit code 2."""


class InputError(ValueError):
    """Bad input. The message says what was expected, what was found, where, and what to do."""
