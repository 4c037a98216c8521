"""Finds and reads what ``predict`` is given: images, folders, patterns, videos and cameras."""

import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from mask_rcnn_plus.data.formats import endings
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.prediction import to_bgr
from mask_rcnn_plus.prediction.images import BGR

IMAGE_SUFFIXES = set(endings())
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}

# A video may announce slightly more frames than it has.
_MISSING_FRAMES = 0.02

# Images of this many bytes (BGR) are read one by one.
_LARGE = 2**27


@dataclass(frozen=True)
class Source:
    """An image, a video or a camera."""

    kind: str  # "image", "video" or "camera"
    path: str  # as messages and tables show it; the number of a camera
    name: str  # unique; output files are named <name>.<suffix>


@dataclass(frozen=True)
class Frame:
    """An image, or a frame of a video."""

    source: Source
    index: int | None  # position in the video, from 0; None for an image
    image: BGR  # (H, W, 3), uint8
    rate: float = 0.0  # frames per second; 0 for an image


def find_sources(inputs: Sequence[str], *, recursive: bool, output: Path) -> list[Source]:
    """Finds everything that the command line names, in its order, each file once.

    Args:
        inputs: files; folders, for their images (not hidden ones); patterns such as
            ``"photos/*.jpg"``; numbers of cameras.
        recursive: include the folders inside folders.
        output: folders and patterns skip the files in it, which come from an earlier run.

    Raises:
        UserError: an input does not exist or contains no image.
    """
    files: dict[str, tuple[str, str, str]] = {}  # resolved path -> kind, path, preferred name
    output = output.resolve()
    for text in inputs:
        for kind, path, name in _expand(text, recursive):
            resolved = Path(path).resolve()
            named_directly = kind == "camera" or path == text
            if named_directly or not resolved.is_relative_to(output):
                files.setdefault(str(resolved), (kind, path, name))
    if not files:
        raise UserError(
            f"all inputs are in the --output folder {output}: name another --output, or the files "
            "one by one"
        )
    taken: set[str] = set()
    return [Source(kind, path, _unique(name, taken)) for kind, path, name in files.values()]


def _expand(text: str, recursive: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, path, preferred name) of everything that one argument names."""
    if not text:  # an unset shell variable; Path would take it for the working directory
        raise UserError("an INPUT is empty: name a file, folder, pattern or camera")
    path = Path(text)
    if path.is_dir():
        entries = path.rglob("*") if recursive else path.iterdir()
        # Hidden files are not the user's: on USB sticks, macOS adds a ._photo.jpg to each photo.
        images = sorted(
            entry
            for entry in entries
            if entry.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in entry.relative_to(path).parts)
            and entry.is_file()
        )
        if not images:
            hint = "" if recursive else "; --recursive includes the folders in it"
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"folder '{text}' has no image ({known}){hint}")
        for image in images:
            yield "image", str(image), str(image.relative_to(path).with_suffix(""))
    elif path.exists():
        yield _kind(path), text, path.stem
    elif text.isdecimal():
        yield "camera", text, f"camera_{text}"
    elif glob.has_magic(text):
        files = sorted(map(Path, glob.glob(text, recursive=True)))  # noqa: PTH207  (absolute too)
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        files = [p for p in files if p.suffix.lower() in suffixes and p.is_file()]
        if not files:
            raise UserError(f"no image or video matches '{text}'")
        for file in files:
            yield _kind(file), str(file), file.stem
    else:
        parent = path.parent if path.parent.is_dir() else Path()
        hint = did_you_mean(path.name, [p.name for p in parent.iterdir()])
        raise UserError(f"there is no file or folder '{text}'{hint}")


def _kind(path: Path) -> str:
    return "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken. Upper and lower case count as equal."""
    result, number = name, 1
    while result.lower() in taken:
        number += 1
        result = f"{name}_{number}"
    taken.add(result.lower())
    return result


def open_camera(number: str) -> Any:
    """Opens a camera, or raises a UserError."""
    camera = cv2.VideoCapture(int(number))
    if not camera.isOpened():
        raise UserError(
            f"camera {number} cannot be opened: it does not exist, or another program uses it (and "
            f"there is no file '{number}')"
        )
    return camera


def read_frames(
    sources: Sequence[Source],
    cameras: dict[str, Any],
    skip: Callable[[str], None],
    *,
    sixteen_bit: str = "image",
) -> Iterator[Frame]:
    """Reads all images and frames, in order.

    Args:
        sources: what to read.
        cameras: number -> opened camera.
        skip: called with the reason for each file that cannot be read completely.
        sixteen_bit: as INPUT.SIXTEEN_BIT.
    """
    for source in sources:
        if source.kind == "image":
            try:
                yield Frame(source, None, to_bgr(source.path, sixteen_bit=sixteen_bit))
            except UserError as error:
                skip(str(error))
        elif source.kind == "video":
            yield from _read_video(source, cv2.VideoCapture(source.path), skip)
        else:
            yield from _read_video(source, cameras[source.path], skip)


def _read_video(source: Source, capture: Any, skip: Callable[[str], None]) -> Iterator[Frame]:
    count = 0
    try:
        announced = _announced_frames(capture)
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 30.0
        while (frame := capture.read())[0]:
            yield Frame(source, count, frame[1], rate)
            count += 1
    finally:
        capture.release()
    if count == 0:
        skip(f"{source.path} is not a video that OpenCV can read")
    elif source.kind == "camera":
        skip(f"camera {source.path} stopped after {count} frames")
    elif announced - count > max(1, _MISSING_FRAMES * announced):
        skip(f"{source.path} ends after {count} of {announced} frames: the rest is unreadable")


def _announced_frames(capture: Any) -> int:
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 2**31 else 0


def count_frames(sources: Sequence[Source]) -> int | None:
    """The number of images and frames that the files announce; None with a camera."""
    if any(source.kind == "camera" for source in sources):
        return None
    return sum(
        1 if source.kind == "image" else _announced_frames(cv2.VideoCapture(source.path))
        for source in sources
    )


def prefetch_batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Splits frames into lists of a size, and reads the next list while the caller uses one.

    Large images come one by one, and the next is read when the caller asks for it.
    """

    def read() -> list[Frame]:
        batch: list[Frame] = []
        while len(batch) < size and sum(f.image.size for f in batch) < _LARGE:
            frame = next(frames, None)
            if frame is None:
                break
            batch.append(frame)
        return batch

    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(read).result()
        while batch:
            large = sum(frame.image.size for frame in batch) >= _LARGE
            following = None if large else pool.submit(read)
            yield batch
            batch.clear()  # frees large images before the next ones are read
            batch = (following or pool.submit(read)).result()
