"""What ends a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: a config key, a file, an argument.

    The message is one line that names the key or file, what was expected, what came and what to do. Command-line
    entry points print it on stderr and exit with code 2; no traceback is shown. Lines of what the user gave, such as a
    name within a file, are joined.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).splitlines()))


class RankLostError(Exception):
    """Another process of the run is gone, or cannot be reached; the run has ended and can be resumed."""
