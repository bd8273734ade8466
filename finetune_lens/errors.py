"""What commands turn into exit codes: a user's mistake (one line, 2), and a pair that is not safe to compare (1)."""


class InputError(ValueError):
    """Bad input. The message says what was expected, what was found, where, and what to do."""


class GateFailed(Exception):
    """The trust gate found what would make a comparison of this pair wrong. Commands leave with exit code 1."""
