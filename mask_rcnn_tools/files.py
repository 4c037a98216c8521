"""Writes the files of commands: checked before the work, written completely or not at all."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mask_rcnn_tools.arguments import UsageError


def require_new(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Checks, before the work starts, that an output file can be written after it.

    Raises:
        UsageError: it exists and may not be replaced, its folder does not exist, or the folder
            accepts no file.
    """
    with writing(path, f"write {option}"):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"{option} {path}: name a file in a folder that exists")
        if path.exists() and not overwrite:
            raise UsageError(f"{option} {path} exists; name another file, or give --overwrite")
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(dir=path.absolute().parent).close()


def prepare_output(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Checks, before a long run, that its files can be written at the end.

    Args:
        folder: created if it does not exist.
        names: the files that will be written into it.
        overwrite: whether existing files may be replaced.

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


def write_file(path: Path, content: str | bytes) -> None:
    """Writes an output file completely or not at all, and prints its path on standard error.

    Raises:
        UsageError: the file cannot be written; an existing file is unchanged.
    """
    with writing(path):
        write_atomically(path, content)
    print(f"written: {path}", file=sys.stderr)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8; see :func:`complete_file`.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with complete_file(path) as part:
        part.write_bytes(data)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """The path of an empty file to write, which takes the name ``path`` at the end of the block.

    So no reader ever sees a part of the content. After an error, the file is removed. Creates the
    folder. A link is replaced, not followed. For a path that is not a regular file, such as
    /dev/stdout, yields the path itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    # Shortened, because a long name with an ending may exceed the file system's limit.
    part = path.with_name(f".{path.name[:40]}-{os.getpid()}.part{path.suffix[:8]}")
    try:
        part.touch(exist_ok=False)  # an existing link may point anywhere
        yield part
        if path.is_file():
            part.chmod(path.stat().st_mode & 0o777)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
