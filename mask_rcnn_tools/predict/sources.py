"""Finds the inputs of ``predict``: images, folders, patterns, videos and cameras.

Imports the plugin only to list a folder or pattern, so that a wrong path is reported at once.
"""

import glob
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mask_rcnn_tools.arguments import UsageError

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
# Windows writes them into folders of images.
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}

# Called with a reason, and the number of items that are not read.
Skip = Callable[[str, int], None]


@dataclass(frozen=True)
class Source:
    """An image, a video or a camera."""

    kind: str  # "image", "video" or "camera"
    path: str  # as messages and tables show it; the number of a camera
    name: str  # unique; output files are named <name>.<suffix>


def find_sources(
    inputs: Sequence[str], *, recursive: bool, output: Path
) -> tuple[list[Source], list[tuple[str, int]]]:
    """Finds the files and cameras that the command line names, in its order, each once.

    Args:
        inputs: files; folders, for their images (not hidden ones); patterns such as
            ``"photos/*.jpg"``; numbers of cameras.
        recursive: include the folders inside folders, but not links to folders.
        output: folders and patterns skip the files in it, which come from an earlier run.

    Returns:
        the sources; and (message, number of files) for files of folders and patterns that are left
        out. The number is 0 for folders inside a folder.

    Raises:
        UsageError: an input does not exist or contains no image.
    """
    files: dict[str, tuple[str, str, str]] = {}  # resolved path -> kind, path, preferred name
    left_out = []
    folder = os.path.join(os.path.realpath(output), "")  # noqa: PTH118  (ends with a separator)
    for text in inputs:
        others: list[Path] = []
        try:
            for kind, path, name in _expand(text, recursive, others):
                resolved = os.path.realpath(path)
                if kind == "camera" or path == text or not resolved.startswith(folder):
                    files.setdefault(resolved, (kind, path, name))
            others = [p for p in others if not os.path.realpath(p).startswith(folder)]
            if not recursive and (inside := _folders_in(text, folder)):
                note = f"folders in '{text}' are not read ({inside}); --recursive includes them"
                left_out.append((note, 0))
        except (OSError, ValueError) as error:
            raise UsageError(f"INPUT '{text}': {getattr(error, 'strerror', error)}") from error
        if others:
            message = (
                f"not read in '{text}': {_kinds(others)}; convert images to JPEG or PNG, and name "
                "videos, linked folders and images without a known ending one by one"
            )
            left_out.append((message, len(others)))
    if not files:
        raise UsageError(
            f"all inputs are in the --output folder {output}: name another --output, or the files "
            "one by one"
        )
    taken: set[str] = set()
    sources = [Source(kind, path, _unique(name, taken)) for kind, path, name in files.values()]
    return sources, left_out


def _expand(text: str, recursive: bool, others: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(kind, path, preferred name) of everything that one argument names."""
    if not text:  # an unset shell variable; Path would take it for the working directory
        raise UsageError("an INPUT is empty: name a file, folder, pattern or camera")
    path = Path(text)
    if path.is_dir():
        images = _split(_files_in(path, recursive, others), _image_suffixes(), others)
        if not images:
            hint = "" if recursive else "; --recursive includes the folders in it"
            known = ", ".join(sorted(_image_suffixes()))
            found = f", but {_kinds(others)}" if others else ""
            raise UsageError(f"folder '{text}' has no image ({known}){found}{hint}")
        for image in images:
            yield "image", str(image), str(image.relative_to(path).with_suffix(""))
    elif path.exists():
        if not path.is_file():
            raise UsageError(
                f"INPUT '{text}' is a pipe or a device: save it to a file first, or name a camera "
                "by its number, such as 0"
            )
        yield _kind(path), text, path.stem
    elif text.isdecimal():
        yield "camera", text, f"camera_{text}"
    elif glob.has_magic(text):
        files = _split(_matches(text), _image_suffixes() | VIDEO_SUFFIXES, others)
        if not files:
            found = f", but {_kinds(others)}" if others else ""
            raise UsageError(f"no image or video matches '{text}'{found}")
        for file in files:
            yield _kind(file), str(file), file.stem
    else:
        raise UsageError(f"INPUT '{text}' does not exist")


def _image_suffixes() -> set[str]:
    from mask_rcnn_plus.data.formats import endings

    return set(endings())


def _files_in(folder: Path, recursive: bool, others: list[Path]) -> list[Path]:
    """The files in a folder. Adds linked and unreadable folders inside it to ``others``."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(folder):
            raise error
        others.append(Path(error.filename))

    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        files += (Path(root, name) for name in names)
        inside = [Path(root, name) for name in folders if recursive and not name.startswith(".")]
        others += filter(Path.is_symlink, inside)
        folders[:] = [path.name for path in inside]
    return sorted(files)


def _folders_in(text: str, output: str) -> str:
    """Some folders in a folder, but not the output folder; "" if there are none."""
    if not Path(text).is_dir():
        return ""
    with os.scandir(text) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name)]
    names = [n for n in names if os.path.realpath(Path(text, n, "_")) != f"{output}_"]
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _matches(pattern: str) -> list[Path]:
    """The files that match a pattern."""
    if "**" not in pattern:
        return sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207  (absolute too)
    # Unlike glob, pathlib does not follow links here, which may lead in circles.
    path = Path(pattern)
    below = str(path.relative_to(path.anchor)) + ("/*" if path.name == "**" else "")
    given = sum(map(_is_hidden, path.parts))
    found = Path(path.anchor).glob(below)
    return sorted(p for p in found if sum(map(_is_hidden, p.parts)) <= given)


def _split(files: Sequence[Path], suffixes: set[str], others: list[Path]) -> list[Path]:
    """The files with these suffixes. Adds the rest to ``others``, except hidden files."""
    kept = []
    for file in files:
        # Programs write hidden files: on USB sticks, macOS adds a ._photo.jpg to each photo.
        if _is_hidden(file.name) or file.name.lower() in _SYSTEM_FILES or file.is_dir():
            continue
        is_read = file.suffix.lower() in suffixes and file.is_file()
        (kept if is_read else others).append(file)
    return kept


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".."


def _kinds(files: Sequence[Path]) -> str:
    """The number of files of each kind, with an example: "2 .heic (IMG_1.heic, ...)"."""
    groups = defaultdict(list)
    for file in files:
        groups[file.suffix.lower() or "without an ending"].append(file.name)
    parts = [
        f"{len(names)} {suffix} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for suffix, names in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")


def _kind(path: Path) -> str:
    return "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken. Names that a file system may confuse are equal."""
    result, number = name, 1
    while (key := unicodedata.normalize("NFC", result).lower()) in taken:
        number += 1
        result = f"{name}_{number}"
    taken.add(key)
    return result
