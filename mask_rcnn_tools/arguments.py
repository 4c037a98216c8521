"""What all commands share: arguments, exit codes, and one line for whatever is wrong.

Nothing of the plugin is imported here, so that help and the doctor start without torch.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn


class UsageError(Exception):
    """A command line that cannot be followed: one line, exit code 2."""


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command to its exit code.

    Args:
        main: takes the arguments; returns an exit code, or raises UserError or UsageError.
        argv: the arguments.

    Returns:
        the command's exit code; 2 after one line on standard error about a mistake in the input;
        130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of the output went away.
    """
    if threading.current_thread() is threading.main_thread():
        # Unlike the default handler, this lets a command end the processes that it has started.
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
    """An argument parser whose refusals are a UsageError, hence one line.

    Options are not to be shortened: what a later version adds would change what they mean. The
    epilog keeps its lines.
    """

    def __init__(self, *, prog: str, description: str | None, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_overrides(self) -> None:
        """Takes config keys and values, as ``opts``; to be called last."""
        what = "config overrides, at the end"
        self.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=what)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argument's ``type``: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return number


def choices(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argument's ``type``: some of the known words, with commas between them."""
    names = list(known)

    def parse(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        for word in words:
            if word not in names:
                # Here, for the doctor starts without the plugin.
                from mask_rcnn_plus.errors import did_you_mean

                hint = did_you_mean(word, names) or f"; there are {', '.join(names)}"
                raise argparse.ArgumentTypeError(f"'{word}' is unknown{hint}")
        return words

    return parse


def image_size(text: str) -> tuple[int, int]:
    """An argument's ``type``: HxW, in pixels, each 64 to 8192."""
    sides = text.split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 64 <= int(s) <= 8192 for s in sides):
        raise argparse.ArgumentTypeError(
            f"must be HxW in pixels, each 64 to 8192, as 800x1216, not '{text}'"
        )
    return int(sides[0]), int(sides[1])


def require_device(name: str) -> str:
    """The device that ``--device`` names.

    Args:
        name: "cpu" or "cuda".

    Raises:
        UsageError: there is no such device here.
    """
    # Here, since the doctor runs where torch does not import.
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA device here; use --device cpu")
    return name


def require_new(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Makes sure, before the work, that a file which an option names replaces none.

    Raises:
        UsageError: it exists, and may not be replaced; or its folder does not.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: name a file in a folder that exists")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {path} exists; name another file, or give --overwrite")


def prepare_output(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Makes sure that a long run's files can be written in the end.

    Args:
        folder: made where it does not exist.
        names: of the files that will be written into it.
        overwrite: whether those may exist.

    Raises:
        UsageError: the folder cannot be made or written into, or a file is there already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write into --output {folder}: {reason}") from error
    for path in (folder / name for name in names):
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name another --output")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; name another --output, or give --overwrite")
