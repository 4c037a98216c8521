"""Prints text that is safe on any terminal and in any pipe, and commands that can be pasted.

Imports only the standard library.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PROGRAM = "mask-rcnn-plus"


@contextmanager
def safe_output() -> Iterator[None]:
    """Inside the block, standard output and standard error are :class:`Output`."""
    streams = sys.stdout, sys.stderr
    if None in streams:  # the process started without them (`>&-`)
        _open_missing_streams()
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def _open_missing_streams() -> None:
    """Drops what goes to a closed stream, which would else go to the next file that is opened."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # the system takes the lowest free number
        pass
    os.close(null)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


class Output:
    """A text stream that accepts any text at any time.

    Class and file names may come from others. So it escapes characters that control a terminal
    (control characters, ANSI sequences, changes of the writing direction), and characters that the
    encoding lacks. If the stream breaks, because `| head` has closed it or the disk is full, it
    drops the rest, so that the command still writes its files.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or as much of it as the stream accepts."""
        encoding = self._stream.encoding or "utf-8"
        escaped = "".join(c if c.isprintable() or c in "\n\r\t" else ascii(c)[1:-1] for c in text)
        try:
            self._stream.write(escaped.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Writes what is in the buffer."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # Drops the text in the buffer too; Python would try to write it again when it exits.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if not isinstance(error, BrokenPipeError) and self is sys.stdout:
            print(f"standard output is incomplete: {error.strerror}", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def shell_command(program: str, *words: Any) -> str:
    """A command line that the user can paste. It starts as this process was started.

    Args:
        program: "mask-rcnn-plus", or a script such as "train_net.py".
        words: its arguments; they are quoted where a shell needs it.
    """
    started = Path(sys.argv[0])
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # `uv run` sets it
        start = f"uv run {program}"
    elif program != PROGRAM:
        start = f"{_as_typed(sys.executable)} {program}"
    elif started.name == "cli.py":
        start = f"{_as_typed(sys.executable)} -m mask_rcnn_tools.cli"
    else:
        start = _as_typed(sys.argv[0]) if started.name == PROGRAM else PROGRAM
    return " ".join([start, *(quote(str(word)) for word in words)])


def _as_typed(program: str) -> str:
    """The name of a program if the shell finds this program by its name, else its path."""
    name = Path(program).name
    return name if shutil.which(name) == program else quote(program)


def quote(word: str) -> str:
    """Quotes a word for a shell; in double quotes, if it has single ones, as config values do."""
    if "'" in word and not re.search(r'["$`\\!\n]', word):
        return f'"{word}"'
    return shlex.quote(word)
