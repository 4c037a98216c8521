"""The result of reading a label format, and helpers of all readers for reading files."""

import base64
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from mask_rcnn_plus.data.formats import endings
from mask_rcnn_plus.errors import printable, reason
from mask_rcnn_tools.check.images import SIDEWAYS, UnreadableFile, exif_orientation, open_image

SUFFIXES = endings()
_MAX_EXAMPLES = 3

Array = npt.NDArray[Any]


@dataclass
class LabelledObject:
    """An object; its mask is the union of the polygons and the RLE.

    Attributes:
        label: name of its class.
        polygons: each [x0, y0, x1, y1, ...] in pixels of the upright image; (0, 0) is the outer
            corner of the first pixel.
        rle: COCO's run lengths, with the size of the image; None for an object of only polygons.
        flags: names of the flags that are set.
    """

    label: str
    polygons: list[list[float]] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    flags: list[str] = field(default_factory=list)


@dataclass
class LabelledImage:
    """An image and its objects.

    Attributes:
        name: path of its file within the new image folder, with "/" between folders.
        height, width: the size of the upright image (after its EXIF orientation), in pixels.
        path: its file; None if ``content`` returns the bytes of the file instead.
        content: returns the bytes of the file.
        orientation: EXIF's, 1 to 8.
        objects: may be empty.
        split: the split in the source; "" if the source has no splits.
        flags: names of the flags that are set for the image.
    """

    name: str
    height: int
    width: int
    path: Path | None = None
    content: Callable[[], bytes] | None = None
    orientation: int = 1
    objects: list[LabelledObject] = field(default_factory=list)
    split: str = ""
    flags: list[str] = field(default_factory=list)


@dataclass
class Labels:
    """The labelled images of a source, and notes on what the conversion leaves out.

    Attributes:
        images: the images.
        classes: names of all classes in their order, if the source has an order.
        skipped: reason -> places, for data that is lost although it belongs to the data set.
        noted: reason -> places, for data that does not belong to it, and other notes.
    """

    images: list[LabelledImage] = field(default_factory=list)
    classes: list[str] | None = None
    skipped: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, what: str, where: object) -> None:
        """Records data that is lost: the reason, such as "files cannot be read", and the place."""
        self.skipped.setdefault(what, []).append(str(where))

    def note(self, what: str, where: object) -> None:
        """Records something that is good to know, with arguments as in ``skip``."""
        self.noted.setdefault(what, []).append(str(where))

    def lines(self) -> list[str]:
        """Lines of text about what was skipped and noted, with examples."""
        lines = []
        for title, group in (("skipped", self.skipped), ("note", self.noted)):
            for what, places in group.items():
                lines.append(f"{title:9}{len(places):>6,} x  {what}")
                for place in places[:_MAX_EXAMPLES]:
                    text = printable(place)
                    lines.append(f"{'':20}{text if len(text) <= 200 else f'{text[:197]}...'}")
                if len(places) > _MAX_EXAMPLES:
                    lines.append(f"{'':20}... {len(places) - _MAX_EXAMPLES:,} more")
        return lines

    def open_image(self, path: Path, name: str) -> LabelledImage | None:
        """An image without objects; None, and skipped, if its file cannot be read.

        Args:
            path: its file.
            name: as in ``LabelledImage``.
        """
        try:
            height, width, orientation = measure(path)
        except UnreadableFile as error:
            self.skip("images cannot be read", f"{path} {error}")
            return None
        return LabelledImage(name, height, width, path, orientation=orientation)


def measure(file: Path | BinaryIO) -> tuple[int, int, int]:
    """Height and width of the upright image, and its EXIF orientation.

    Raises:
        UnreadableFile: it is not an image.
    """
    with _open(file) as image:
        width, height = image.size
        orientation = exif_orientation(image)
    return (width, height, orientation) if orientation in SIDEWAYS else (height, width, orientation)


def read_pixels(file: Path | BinaryIO) -> Array:
    """The pixels of a label image: (H, W) palette indices or values, or (H, W, 3) RGB colours.

    Raises:
        UnreadableFile: it is not an image.
    """
    with _open(file) as image:
        try:
            if image.mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                return np.asarray(image).astype(np.int64)
            return np.asarray(image.convert("RGB")).astype(np.int64)
        except Exception as error:  # Pillow's plug-ins raise many types of errors
            raise UnreadableFile(f"cannot be decoded: {reason(error, 120)}") from error


def suffix_of(content: bytes) -> str:
    """The file name suffix for an image's format, such as ".jpg".

    Raises:
        UnreadableFile: it is not an image.
    """
    with _open(io.BytesIO(content)) as image:
        format = image.format or "PNG"
        return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(format, f".{format.lower()}")


def _open(file: Path | BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images and damaged metadata
        return open_image(file)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UnreadableFile: the file cannot be read or is not valid JSON.
    """
    try:
        # Editors on Windows write a byte order mark before UTF-8.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"is not valid JSON: {reason(error, 120)}") from error


def from_base64(text: Any) -> bytes:
    """Decodes base64.

    Raises:
        UnreadableFile: the value is not base64 text.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise UnreadableFile(f"is not valid base64: {reason(error, 120)}") from error


def find_image(name: str, bases: Sequence[Path], roots: Sequence[Path]) -> tuple[Path, str] | None:
    """Finds the image file that a label names, and never one outside the user's folders.

    Args:
        name: relative or absolute, perhaps with the backslashes of Windows.
        bases: folders that it may be relative to. If that fails, only its last part is looked up.
        roots: folders whose files may be read.

    Returns:
        the file, and its path relative to its root; or None.
    """
    name = name.replace("\\", "/")
    if not name or "\0" in name:
        return None
    for relative in (name, PurePosixPath(name).name):
        for base in bases:
            real = Path(os.path.realpath(base / relative))
            for root in roots:
                top = Path(os.path.realpath(root))
                if real.is_relative_to(top) and real.is_file():
                    return real, real.relative_to(top).as_posix()
    return None


def images_below(folder: Path) -> list[Path]:
    """All files in a folder with the suffix of an image, as ``files_below``."""
    return [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]


def files_below(folder: Path, suffix: str = "") -> list[Path]:
    """All files in a folder and its subfolders, sorted, except hidden files and folders."""
    return sorted(
        path
        for path in folder.rglob(f"*{suffix}")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def upright(pixels: Array, image: LabelledImage) -> Array:
    """Turns the pixels of a label image (H, W, ...) upright like its image.

    Raises:
        UnreadableFile: the size differs from the image's, or does not show whether the label image
            is already upright.
    """
    size = pixels.shape[:2]
    seen = (image.height, image.width)
    stored = seen[::-1] if image.orientation in SIDEWAYS else seen
    if size not in (seen, stored):
        raise UnreadableFile(
            f"is {size[1]} x {size[0]} pixels, but its image is {image.width} x {image.height}"
        )
    if image.orientation == 1 or size != stored:
        return pixels
    if size == seen:
        raise UnreadableFile(
            f"may or may not be upright: its image has EXIF orientation {image.orientation}; save "
            "both upright"
        )
    return turn(pixels, image.orientation)


def turn(pixels: Array, orientation: int) -> Array:
    """Turns the pixels (H, W, ...) of a stored image upright.

    Args:
        orientation: EXIF's, 1 to 8; 6 turns clockwise by 90 degrees.
    """
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
