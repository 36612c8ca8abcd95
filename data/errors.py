"""Errors of the data package, and how text that may hold anything is shown."""

import io
import re
import sys

_MAX_REASON_CHARS = 300
_MAX_MESSAGE_CHARS = 1500
# Of objects in memory, as Python writes them; shorter numbers are places in a file.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{8,}")


def printable(text: str, max_chars: int | None = _MAX_MESSAGE_CHARS) -> str:
    """Returns text as one line without control characters: names and values may hold anything.

    Args:
        text: What a terminal or a page is to show as it is, whatever it holds.
        max_chars: Its greatest length; None for any.
    """
    text = text[:max_chars]
    return text if text.isprintable() else repr(text)[1:-1][:max_chars]


def repeatable(text: str) -> str:
    """Returns the message of an exception without addresses of memory, which differ from run to run."""
    return _ADDRESS.sub("", text)


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

    Args:
        message: Made one line.
        max_chars: Its longest length; only a list of many files needs more than the default.
    """

    def __init__(self, message: str, max_chars: int = _MAX_MESSAGE_CHARS) -> None:
        super().__init__(printable(message, max_chars))


class LoaderError(RuntimeError):
    """The loader cannot go on although settings and data may be right: a worker was killed, or gives no answer.

    The message is one line. Starting again may help, so the exit code is not that of a mistake.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class BadSample(Exception):
    """One sample that cannot be used; the loader replaces it and goes on.

    Args:
        reason: What is wrong with the sample; made one short line, the same in every run.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = printable(repeatable(reason), _MAX_REASON_CHARS)
