"""Shared by all commands: arguments, exit codes, and one line for each error.

Imports nothing from the plugin, and torch only in a function: help and the doctor need neither.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn


class UsageError(Exception):
    """A command line that cannot be followed. Printed as one line; exit code 2."""


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command and turns its errors into exit codes.

    Args:
        main: accepts the arguments; returns an exit code, or raises UserError or UsageError.
        argv: the arguments.

    Returns:
        the command's exit code; 2 after a UserError or UsageError, printed as one line to standard
        error; 130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of the output has closed it.
    """
    if threading.current_thread() is threading.main_thread():
        # The default handler would not run the cleanup that ends a command's child processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()
    except _user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes standard output at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _user_errors() -> tuple[type[Exception], ...]:
    """UsageError, and the plugin's UserError if the command has imported the plugin."""
    errors = sys.modules.get("mask_rcnn_plus.errors")
    return (UsageError, errors.UserError) if errors else (UsageError,)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError.

    Options cannot be abbreviated, because a new option could change what an abbreviation means. The
    epilog keeps its line breaks.
    """

    def __init__(self, *, prog: str, description: str | None, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_config(self, *, overrides: bool = True) -> None:
        """Adds ``--config-file`` and, with overrides, KEY VALUE pairs as ``opts``.

        With overrides, no other positional argument may follow.
        """
        self.add_argument("--config-file", required=True, metavar="YAML", help="config to read")
        if overrides:
            self.add_overrides()

    def add_overrides(self) -> None:
        """Adds config keys and values, as ``opts``, after all other positional arguments."""
        text = "config keys and values, after all options"
        self.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=text)

    def add_output(self, metavar: str, text: str, *, default: Path | None = None) -> None:
        """Adds ``--output``, required without a default, and ``--overwrite``."""
        self.add_argument(
            "--output",
            type=Path,
            required=default is None,
            default=default,
            metavar=metavar,
            help=f"{text} (default: {default})" if default else text,
        )
        self.add_overwrite()

    def add_max_pixels(self) -> None:
        """Adds ``--max-pixels``, for ``formats.limit_pixels``."""
        self.add_argument(
            "--max-pixels",
            type=positive,
            default=0,
            metavar="N",
            help="read images of up to N pixels (default: Pillow's limit, 178,956,970)",
        )

    def add_overwrite(self) -> None:
        """Adds ``--overwrite``."""
        self.add_argument("--overwrite", action="store_true", help="replace existing files")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """Argument ``type``: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return number


def fraction(text: str) -> float:
    """Argument ``type``: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not '{text}'")
    return number


def choices(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Argument ``type``: some of the known names, separated by commas."""
    known = list(known)

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
                raise argparse.ArgumentTypeError(f"'{name}' is unknown; {hint}")
        return names

    return parse


def image_size(text: str) -> tuple[int, int]:
    """Argument ``type``: HxW in pixels, each from 64 to 8192."""
    sides = text.split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 64 <= int(s) <= 8192 for s in sides):
        raise argparse.ArgumentTypeError(
            f"must be HxW in pixels, each from 64 to 8192, such as 800x1216, not '{text}'"
        )
    return int(sides[0]), int(sides[1])


def require_device(name: str) -> str:
    """Returns the value of ``--device``, "cpu" or "cuda".

    Raises:
        UsageError: torch sees no CUDA device.
    """
    import torch  # not at the top: the doctor runs without torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA device; use --device cpu")
    return name


def require_new(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Checks, before the work starts, that an output file can be created.

    Raises:
        UsageError: it exists and may not be replaced, or its folder does not exist.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: name a file in a folder that exists")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {path} exists; name another file, or give --overwrite")


def prepare_output(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Checks, before a long run, that its files can be written at the end.

    Args:
        folder: created if it does not exist.
        names: the files to write into it.
        overwrite: whether the files may exist.

    Raises:
        UsageError: the folder cannot be created or written into, or a file exists.
    """
    with writing(folder, "write into --output"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    for path in (folder / name for name in names):
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name another --output")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; name another --output, or give --overwrite")


@contextmanager
def writing(path: Path, action: str = "write") -> Iterator[None]:
    """Turns an OSError into a UsageError "cannot <action> <path>: <reason>"."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot {action} {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes an output file and says so on standard error.

    Raises:
        UsageError: the file cannot be written.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")
    print(f"written: {path}", file=sys.stderr)
