"""The exceptions a user's mistake, or a full disk, becomes."""

from data.errors import printable


class ConfigError(ValueError):
    """A setting, file or environment the user can fix.

    The message is a single line that says what was given, what was expected and how to fix it. The entry point
    prints it without a traceback and exits with code 2.

    Args:
        message: Made one line.
        max_chars: Its longest length; only a list of many files needs more than the default.
    """

    def __init__(self, message: str, max_chars: int = 1500) -> None:
        super().__init__(printable(message, max_chars))


class SaveError(ConfigError):
    """A checkpoint could not be written: no room, no permission, a failing disk. Raised on all ranks alike."""
