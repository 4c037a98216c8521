"""What ``predict`` is given: files, folders, patterns, videos and cameras, frame by frame."""

import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2

from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.prediction import to_bgr
from mask_rcnn_plus.prediction.images import BGR

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".gif"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}

# A container may count some frames more than it has.
_MISSING_FRAMES = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One thing to predict on.

    Attributes:
        kind: "image", "video" or "camera".
        path: of the file, as messages and tables name it; of a camera its number.
        name: where its outputs go below the output folder, without the ending; no two are alike.
    """

    kind: str
    path: str
    name: str


@dataclass(frozen=True)
class Shot:
    """One picture or frame.

    Attributes:
        source: where it is from.
        frame: its number in a video, from 0; None of an image.
        image: (H, W, 3), BGR.
        rate: frames a second; 0 of an image.
    """

    source: Source
    frame: int | None
    image: BGR
    rate: float = 0.0


def find_sources(inputs: Sequence[str], *, recursive: bool, output: Path) -> list[Source]:
    """Everything that the command line names, each file once, in its order.

    Args:
        inputs: files; folders, whose images are taken but for hidden ones; patterns such as
            ``"photos/*.jpg"``; numbers of cameras.
        recursive: folders with all folders in them.
        output: what lies in it is not taken from folders and patterns: it is from an earlier run.

    Raises:
        UserError: one of them does not exist, or has no image in it.
    """
    found: dict[str, tuple[str, str, str]] = {}  # by its real path: kind, path, wished name
    inside = output.resolve()
    for text in inputs:
        for kind, path, wish in _expand(text, recursive):
            real = Path(path).resolve()
            chosen = kind == "camera" or path == text
            if not chosen and real.is_relative_to(inside):
                continue
            found.setdefault(str(real), (kind, path, wish))
    if not found:
        raise UserError(f"{output} is the folder of --output, whose files are not predicted on")
    taken: set[str] = set()
    return [Source(kind, path, _free(wish, taken)) for kind, path, wish in found.values()]


def _expand(text: str, recursive: bool) -> Iterator[tuple[str, str, str]]:
    if not text:  # of a variable without a value; Path would take it for the working directory
        raise UserError("an INPUT is empty: name a file, folder, pattern or camera")
    path = Path(text)
    if path.is_dir():
        files = path.rglob("*") if recursive else path.iterdir()
        # What is hidden is not people's: macOS lays a ._photo.jpg beside each photo on a USB stick.
        seen = (p for p in files if not any(n.startswith(".") for n in p.relative_to(path).parts))
        pictures = sorted(p for p in seen if p.suffix.lower() in PICTURES and p.is_file())
        if not pictures:
            deeper = "" if recursive else "; --recursive looks into the folders in it as well"
            raise UserError(f"folder '{text}' has no image ({_endings()}) in it{deeper}")
        for picture in pictures:
            yield "image", str(picture), str(picture.relative_to(path).with_suffix(""))
    elif path.exists():
        yield _kind(path), text, path.stem
    elif text.isdecimal():
        yield "camera", text, f"camera_{text}"
    elif glob.has_magic(text):
        files = sorted(map(Path, glob.glob(text, recursive=True)))  # noqa: PTH207  (absolute too)
        files = [p for p in files if p.suffix.lower() in PICTURES | VIDEOS and p.is_file()]
        if not files:
            raise UserError(f"no image or video matches '{text}'")
        for file in files:
            yield _kind(file), str(file), file.stem
    else:
        parent = path.parent if path.parent.is_dir() else Path()
        hint = did_you_mean(path.name, [p.name for p in parent.iterdir()])
        raise UserError(f"there is no file or folder '{text}'{hint}")


def _kind(path: Path) -> str:
    return "video" if path.suffix.lower() in VIDEOS else "image"


def _endings() -> str:
    return ", ".join(sorted(PICTURES))


def _free(wish: str, taken: set[str]) -> str:
    """The name, or where another has it the name with a number."""
    name, number = wish, 1
    # Some file systems do not tell upper from lower case.
    while name.lower() in taken:
        number += 1
        name = f"{wish}_{number}"
    taken.add(name.lower())
    return name


def open_camera(number: str) -> Any:
    """An opened camera.

    Raises:
        UserError: there is none of that number, or another program has it.
    """
    camera = cv2.VideoCapture(int(number))
    if not camera.isOpened():
        raise UserError(
            f"camera {number} cannot be opened: there is none, or another program has it (and "
            f"there is no file '{number}')"
        )
    return camera


def shots(
    sources: Sequence[Source], cameras: dict[str, Any], skip: Callable[[str], None]
) -> Iterator[Shot]:
    """All pictures and frames, in order.

    Args:
        sources: what to read.
        cameras: the opened ones, by number.
        skip: is told of each file that cannot be read, or not to its end; the rest goes on.
    """
    for source in sources:
        if source.kind == "image":
            try:
                yield Shot(source, None, to_bgr(source.path))
            except UserError as error:
                skip(str(error))
        elif source.kind == "video":
            yield from _frames(source, cv2.VideoCapture(source.path), skip)
        else:
            yield from _frames(source, cameras[source.path], skip)


def _frames(source: Source, capture: Any, skip: Callable[[str], None]) -> Iterator[Shot]:
    try:
        promised = _promised(capture)
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 30.0
        count = 0
        while True:
            there, image = capture.read()
            if not there:
                break
            yield Shot(source, count, image, rate)
            count += 1
    finally:
        capture.release()
    if count == 0:
        skip(f"{source.path} is no video that OpenCV can read")
    elif source.kind == "camera":
        skip(f"camera {source.path} gave no more frames after {count}")
    elif promised - count > max(1, _MISSING_FRAMES * promised):
        skip(f"{source.path} ends after {count} of {promised} frames: the rest cannot be read")


def _promised(capture: Any) -> int:
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 2**31 else 0


def count_shots(sources: Sequence[Source]) -> int | None:
    """How many pictures and frames there will be, as far as files say; None with a camera."""
    total = 0
    for source in sources:
        if source.kind == "camera":
            return None
        total += _promised(cv2.VideoCapture(source.path)) if source.kind == "video" else 1
    return total


def ahead(items: Iterator[T], count: int) -> Iterator[list[T]]:
    """Lists of so many items, the last one shorter; the next is read while one is worked on."""

    def take() -> list[T]:
        return [item for _, item in zip(range(count), items, strict=False)]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(take)
        while part := coming.result():
            coming = pool.submit(take)
            yield part
