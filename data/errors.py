"""Errors of the data package, and how text that may hold anything is shown."""

import io
import sys

_MAX_REASON_CHARS = 300
_MAX_MESSAGE_CHARS = 1500


def printable(text: str, max_chars: int | None = _MAX_MESSAGE_CHARS) -> str:
    """Returns text as one line without control characters: names and values may hold anything.

    Args:
        text: What a terminal or a page is to show as it is, whatever it holds.
        max_chars: Its greatest length; None for any.
    """
    text = text[:max_chars]
    return text if text.isprintable() else repr(text)[1:-1][:max_chars]


def printable_lines(text: str) -> str:
    """Returns text of several lines, each made `printable`."""
    return "\n".join(printable(line, None) for line in text.split("\n"))


def escape_unencodable() -> None:
    """Has standard output write what its encoding lacks as escapes: a name from data must not end the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class DataError(ValueError):
    """A mistake in the data or its configuration that the user can fix.

    The message is one line: what was given, what was expected, and the fix.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class BadSample(Exception):
    """One sample that cannot be used; the loader replaces it and goes on.

    Args:
        reason: What is wrong with the sample; made one short line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = printable(reason, _MAX_REASON_CHARS)
