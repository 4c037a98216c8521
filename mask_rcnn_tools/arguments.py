"""Shared by all commands: arguments, exit codes, and one line for each error.

Imports nothing from the plugin, and torch only in a function: help, errors in the arguments and the
doctor need neither. A command imports its implementation after it has parsed its arguments.
"""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from mask_rcnn_tools.terminal import PROGRAM, safe_output, shell_command


class UsageError(Exception):
    """A command line that cannot be followed. Printed as one line; exit code 2."""


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command and turns its errors into exit codes.

    Args:
        main: accepts the arguments; returns an exit code, or raises UserError or UsageError.
        argv: the arguments.

    Returns:
        the command's exit code; 2 after a UserError, a UsageError or an error of the operating
        system, printed as one line to standard error; 130 after Ctrl-C, 143 after SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        # The default handler would not run the cleanup that ends a command's child processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with safe_output():
        try:
            _require_working_directory()
            return main(argv)
        except _user_errors() as error:
            _print_error(str(error))
        except ModuleNotFoundError as error:
            if error.name != "detectron2":
                raise
            _print_error(str(error))
        except OSError as error:
            where = f"'{error.filename}': " if error.filename else ""
            _print_error(f"{where}{error.strerror or error}")
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        return 2


def _print_error(message: str) -> None:
    # A file name may contain line breaks.
    print("error:", " ".join(message.splitlines()), file=sys.stderr)


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the working directory was deleted; change to another one") from error


def _user_errors() -> tuple[type[Exception], ...]:
    """UsageError, and the plugin's UserError if the command has imported the plugin."""
    errors = sys.modules.get("mask_rcnn_plus.errors")
    return (UsageError, errors.UserError) if errors else (UsageError,)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError.

    Options cannot be abbreviated, because a new option could change what an abbreviation means. The
    epilog keeps its line breaks. Its commands begin as the user has started this one.
    """

    def __init__(self, *, prog: str, description: str | None, epilog: str) -> None:
        start = shell_command(PROGRAM)
        super().__init__(
            prog=prog.replace(PROGRAM, start),
            description=description,
            epilog=epilog.replace(PROGRAM, start),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_config(self, *, overrides: bool = True) -> None:
        """Adds ``--config-file`` and, with overrides, KEY VALUE pairs as ``opts``.

        With overrides, no other positional argument may follow.
        """
        self.add_argument(
            "--config-file",
            required=True,
            type=existing_file,
            metavar="YAML",
            help="config to read",
        )
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
            type=any_path,
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

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses, and checks that ``opts``, if there are any, are pairs of a key and a value."""
        arguments = super().parse_args(*args, **kwargs)
        opts = getattr(arguments, "opts", [])
        for key in opts[0::2]:
            if key.startswith("-"):
                self.error(f"option '{key}' follows a config key: put options first")
        if len(opts) % 2:
            self.error(f"config key '{opts[-1]}' has no value")
        return arguments

    def error(self, message: str) -> NoReturn:
        see = " See" if message.endswith("?") else "; see"
        raise UsageError(f"{message}{see} {self.prog} --help")


def any_path(text: str) -> Path:
    """Argument ``type``: a path that the operating system accepts; it need not exist."""
    try:
        if not text:
            raise ValueError("it is empty")
        Path(text).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot open '{text}': {why}") from error
    return Path(text)


def existing_file(text: str) -> Path:
    """Argument ``type``: the path of a file."""
    return _existing(text, "file", Path.is_file)


def existing_folder(text: str) -> Path:
    """Argument ``type``: the path of a folder."""
    return _existing(text, "folder", Path.is_dir)


def existing_path(text: str) -> Path:
    """Argument ``type``: the path of a file or a folder."""
    return _existing(text, "file or folder", Path.exists)


def _existing(text: str, kind: str, is_kind: Callable[[Path], bool]) -> Path:
    path = any_path(text)
    if is_kind(path):
        return path
    if path.exists():
        raise argparse.ArgumentTypeError(f"'{text}' is not a {kind}")
    siblings = islice(path.parent.iterdir(), 1000) if path.parent.is_dir() else ()
    close = get_close_matches(path.name, [sibling.name for sibling in siblings], n=1)
    hint = f"; did you mean '{path.with_name(close[0])}'?" if close else ""
    raise argparse.ArgumentTypeError(f"{kind} '{text}' does not exist{hint}")


def weights(text: str) -> str:
    """Argument ``type``: a file, a URL or a ``detectron2://`` name."""
    return text if "://" in text else str(existing_file(text))


def device(text: str) -> str:
    """Argument ``type``: "auto", or a device of torch that computes, perhaps with a number."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu|hpu|mtia|xla)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is unknown; set auto, cpu, cuda or cuda:1")
    return text


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
