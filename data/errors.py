"""Errors of the data package."""

_MAX_REASON_CHARS = 300


def printable(text: str) -> str:
    """Returns text as one line without control characters: names out of archives may hold anything."""
    return text if text.isprintable() else repr(text)[1:-1]


class DataError(ValueError):
    """A mistake in the data or its configuration that the user can fix.

    The message is one line: what was given, what was expected, and the fix.
    """


class BadSample(Exception):
    """One sample that cannot be used; the loader replaces it and goes on.

    Args:
        reason: What is wrong with the sample; made one short line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = printable(reason)[:_MAX_REASON_CHARS]
