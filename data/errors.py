"""Errors of the data package."""


class DataError(ValueError):
    """A mistake in the data or its configuration that the user can fix.

    The message is one line: what was given, what was expected, and the fix.
    """


class BadSample(Exception):
    """One sample that cannot be used; the loader replaces it and goes on.

    Args:
        reason: One line that says what is wrong with the sample.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
