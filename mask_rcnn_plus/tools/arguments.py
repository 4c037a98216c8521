"""What the tools' command lines have in common: one-line refusals, before any long work."""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from mask_rcnn_plus.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are a UserError, hence one line.

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
        raise UserError(f"{message}; see {self.prog} --help")


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
        UserError: there is no such device here.
    """
    # Here, since the doctor runs where torch does not import.
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device here; use --device cpu")
    return name


def require_new(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Makes sure, before the work, that a file which an option names replaces none.

    Raises:
        UserError: it exists, and may not be replaced; or its folder does not.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: name a file in a folder that exists")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {path} exists; name another file, or give --overwrite")


def prepare_output(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Makes sure that a long run's files can be written in the end.

    Args:
        folder: made where it does not exist.
        names: of the files that will be written into it.
        overwrite: whether those may exist.

    Raises:
        UserError: the folder cannot be made or written into, or a file is there already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write into --output {folder}: {reason}") from error
    for path in (folder / name for name in names):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name another --output")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; name another --output, or give --overwrite")
