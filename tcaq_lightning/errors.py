"""The one exception a user should ever see."""


class UserError(Exception):
    """A mistake in what the user gave: a config key, a file, an argument.

    The message is one line that names the key or file, what was expected, what came and what to do. Command-line
    entry points print it on stderr and exit with code 2; no traceback is shown.
    """
