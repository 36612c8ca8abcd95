"""Paths as users write them: `~`, `$VARIABLES` and file:// URLs, turned into the names of files in this one place."""

import argparse
import os
import re
from pathlib import Path
from urllib.parse import unquote

from data.errors import DataError

_FILE_URL = re.compile(r"file:(?://(?P<host>[^/]*))?(?=/)", re.IGNORECASE)
# `pipe:` commands are the shell's, and other URLs the server's: both are left as they are.
_ELSEWHERE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_HERE = ("", "localhost")


def expand_path(text: str) -> str:
    """Returns a path, or a pattern of paths, as the file system knows it.

    Args:
        text: What the user wrote. `~`, `~user`, `$NAME` and `${NAME}` are replaced as a shell would, wherever it was
            written; a file:// URL becomes the path it names. `pipe:` commands and other URLs stay as they are.

    Raises:
        DataError: The user or the variable is not known (unless there is a file of just this name), a file:// URL of
            another machine, or a NUL character: a folder called "~bob" or "$DATA" is never what was meant.
    """
    if "\0" in text:
        raise DataError(f"{text!r} is not the name of a file: it holds a NUL character")
    url = _FILE_URL.match(text)
    if url is not None:
        return _path_of_url(text, url)
    if _ELSEWHERE.match(text):
        return text
    return _expand_home(_expand_variables(text))


def path_argument(text: str) -> Path:
    """A path on the command line; the `type` of an argument of argparse.

    Raises:
        argparse.ArgumentTypeError: See `expand_path`; or an empty text, as an unset variable of the shell leaves.
    """
    try:
        return Path(given_path(text))
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def given_path(text: str) -> str:
    """`expand_path` of a text that must not be empty.

    Raises:
        DataError: See `expand_path`; or an empty text.
    """
    if not text.strip():
        raise DataError("the path is empty; is a variable of the shell not set?")
    return expand_path(text)


def split_existing(path: str) -> tuple[str, str]:
    """Cuts a path in two: what is there as it is written, up to a slash or the end, and the rest.

    Names of folders may hold any character: what exists is no pattern, whatever it looks like.
    """
    for end in [len(path), *(place + 1 for place in range(len(path) - 1, -1, -1) if path[place] == "/")]:
        if os.path.lexists(path[:end]):
            return path[:end], path[end:]
    return "", path


def _path_of_url(text: str, url: re.Match) -> str:
    host, written = url["host"] or "", text[url.end() :]
    if host.lower() not in _HERE:
        # Not a URL by the book, and yet clear: file://~/shards, file://shards/0.tar.
        if not host.startswith("~") and not os.path.lexists(host):
            raise DataError(f"{text!r} names a file of the host {host!r}; write file:///path for a local one")
        written = _expand_home(host + written)
    decoded = unquote(written)
    if "\0" in decoded:
        raise DataError(f"{text!r} is not the name of a file: it holds a NUL character")
    # A percent sign may be part of the name.
    return written if os.path.lexists(written) and not os.path.lexists(decoded) else decoded


def _expand_variables(text: str) -> str:
    there = len(split_existing(text)[0]) if "$" in text else 0

    def value(match: re.Match) -> str:
        name = match[1] or match[2]
        found = os.environ.get(name)
        if found is None and match.start() >= there:
            raise DataError(f"{text!r}: the environment variable {name} is not set; set it, or write the path out")
        return match[0] if found is None else found

    return _VARIABLE.sub(value, text)


def _expand_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111 - a pattern may hold what Path would tidy away
    if expanded != text or split_existing(text)[0]:
        return expanded
    user = text[1:].partition("/")[0]
    if user:
        raise DataError(f"{text!r}: there is no user {user!r}; write ./{text} for a folder of that name")
    raise DataError(f"{text!r}: the home folder of this user is not known; set HOME, or write the path out")
