"""The exception for errors that the user can fix, and helpers for its messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the user's input: a path, a key, a value, a data set, a checkpoint.

    The commands print the message as one line on standard error and exit with ``exit_code``.
    Subclasses for events in a run (no space, divergence) set another code. The message names the
    thing, the value and what to do.

    Args:
        message: one line. If a loader worker raised the error, PyTorch raises it again with the
            worker's traceback in the message, which is removed here.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        if message.startswith("Caught UserError in DataLoader worker"):
            message = message.rstrip().rsplit("UserError: ", 1)[-1]
        super().__init__(message)

    def __str__(self) -> str:
        """The message on one line, without characters that a terminal would obey."""
        return printable(" ".join(super().__str__().splitlines()))


def printable(text: str) -> str:
    """A text, such as a name from a file, on one line that cannot control a terminal.

    Control characters, ANSI sequences, changes of the writing direction and lone surrogates are
    escaped.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A suggestion to append to an error message.

    Args:
        name: what the user wrote.
        choices: the names that exist.

    Returns:
        ``"; did you mean 'balloon_train'?"`` if one of the choices is close, else "".
    """
    matches = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def reason(error: BaseException, limit: int = 200) -> str:
    """The reason why an operation failed, on one line, for the end of an error message.

    Args:
        error: what was raised.
        limit: the most characters.

    Returns:
        the system's message for an OSError ("No space left on device"); otherwise the error's own
        message, or the name of its type if the message is empty.
    """
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split())[:limit] or type(error).__name__
