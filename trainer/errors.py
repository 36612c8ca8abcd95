"""The one exception a user's mistake becomes."""

from data.errors import printable


class ConfigError(ValueError):
    """A setting, file or environment the user can fix.

    The message is a single line that says what was given, what was expected and how to fix it. The entry point
    prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
