"""The result of reading a label format, and helpers of all readers for reading files."""

import base64
import io
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from mask_rcnn_plus.data.file_names import ImageFiles
from mask_rcnn_plus.data.formats import endings
from mask_rcnn_plus.errors import UserError, printable, reason
from mask_rcnn_tools.check.images import SIDEWAYS, UnreadableFile, exif_orientation, open_image

SUFFIXES = endings()
_MAX_EXAMPLES = 3
# A word in the name of a file or folder -> the split.
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "test": "test"}
_SPLITS |= {"validation": "val", "testing": "test"}

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
        fields: more fields of its COCO annotation, such as iscrowd and keypoints. With a "bbox",
            the object needs no mask.
    """

    label: str
    polygons: list[list[float]] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    flags: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


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
        more_splits: further splits of the source that have the same image.
        flags: names of the flags that are set for the image.
        id: its id in the source's COCO json, of any type.
    """

    name: str
    height: int
    width: int
    path: Path | None = None
    content: Callable[[], bytes] | None = None
    orientation: int = 1
    objects: list[LabelledObject] = field(default_factory=list)
    split: str = ""
    more_splits: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    id: Any = None


@dataclass
class Labels:
    """The labelled images of a source, and notes on what the conversion leaves out.

    Attributes:
        images: the images.
        classes: names of all classes in their order, if the source has an order.
        categories: class -> fields of its COCO category, such as id and keypoints.
        skipped: reason -> places, for data that is lost although it belongs to the data set.
        noted: reason -> places, for data that does not belong to it, and other notes.
    """

    images: list[LabelledImage] = field(default_factory=list)
    classes: list[str] | None = None
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
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

    def find_file(
        self,
        files: ImageFiles,
        name: str,
        where: object,
        near: Path | None = None,
        remedy: str = "--images FOLDER names their folder",
    ) -> Path | None:
        """The file of an image; None, and skipped, if there is none or if it could be several.

        Args:
            files, name, near: as in ``ImageFiles.find``.
            where: the place of the name, for the message.
            remedy: what to do about missing images.
        """
        file = files.find(name, near)
        if file is None and name in files.ambiguous:
            first, second = files.ambiguous[name][:2]
            what = "images could be one of several files; write the folder into the name"
            self.skip(what, f"{where}: '{name}': {first}, {second}")
        elif file is None:
            self.skip(f"images are missing ({remedy})", f"{where}: '{name}'")
        return file

    def note_names(self, files: ImageFiles) -> None:
        """Notes the images that were found although their names differ from those of the files."""
        for how, places in files.resolved.items():
            for place in places:
                self.note(f"images were found {how}", place)

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


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 as some editors on Windows save it.

    Raises:
        UnreadableFile: the file cannot be read, or has another encoding.
    """
    if kind := irregular_kind(path):  # reading a pipe could wait forever
        raise UnreadableFile(f"is {kind}; name a file")
    try:
        content = path.read_bytes()
        return content.decode(json.detect_encoding(content))
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise UnreadableFile("is not UTF-8 text; save it with the encoding UTF-8") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UnreadableFile: the file cannot be read or is not valid JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"is not valid JSON: {reason(error, 120)}") from error


def read_each(
    read: Callable[[Path], Any], paths: Iterable[Path], source: Path, labels: Labels
) -> Iterator[tuple[Path, Any]]:
    """Each label file and its content. Skips files that cannot be read.

    Args:
        read: returns the content of a file, or raises UnreadableFile.
        paths: the files.
        source: what the user wants to convert.
        labels: collects what is skipped.

    Raises:
        UserError: the source is a file that cannot be read.
    """
    for path in paths:
        try:
            yield path, read(path)
        except UnreadableFile as error:
            if path == source:
                raise UserError(f"'{path}' {error}") from error
            labels.skip("files cannot be read", f"{path} {error}")


def from_base64(text: Any) -> bytes:
    """Decodes base64.

    Raises:
        UnreadableFile: the value is not base64 text.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise UnreadableFile(f"is not valid base64: {reason(error, 120)}") from error


def images_below(folder: Path) -> list[Path]:
    """All files in a folder with the suffix of an image, as ``files_below``."""
    return files_below(folder, *SUFFIXES)


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """All files in a folder and its subfolders, sorted, except hidden files and folders.

    Args:
        folder: the folder. The only result for a file is the file.
        suffixes: in small letters, such as ".json"; without them, all files are listed.
    """
    if not folder.is_dir():
        return [folder]
    return sorted(
        path
        for path in folder.rglob("*")
        if (not suffixes or path.suffix.lower() in suffixes)
        and os.path.isfile(path)  # noqa: PTH113  (Path's method raises errors for some links)
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


# The readers open these folders by their name, so they may be links.
_LABEL_FOLDERS = {"labels", "masks", "annotations", "SegmentationObject", "SegmentationClass"}


def report_irregular(labels: Labels, source: Path) -> None:
    """Reports what ``files_below`` leaves out: links to folders or nowhere, pipes and devices."""
    read = [os.path.realpath(image.path) for image in labels.images if image.path]
    for path in sorted(source.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(source).parts):
            continue
        if os.path.isdir(path):  # noqa: PTH112  (Path's method raises errors for some links)
            inside = os.path.join(os.path.realpath(path), "")  # noqa: PTH118  (ends with "/")
            used = path.name in _LABEL_FOLDERS or any(name.startswith(inside) for name in read)
            if path.is_symlink() and not used:
                what = "links to folders are not followed; name the folders as SOURCE"
                labels.skip(what, path)
        elif kind := irregular_kind(path):
            labels.skip("files are links that lead nowhere, pipes or devices", f"{path} is {kind}")


def irregular_kind(path: Path) -> str:
    """What a path is, if it is not a file or a folder, such as "a pipe"; otherwise ""."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        is_link = os.path.islink(path)  # noqa: PTH114  (Path's method raises errors for some links)
        return f"a link that leads nowhere ({os.readlink(path)})" if is_link else ""  # noqa: PTH115
    names = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return "" if kind in (stat.S_IFREG, stat.S_IFDIR) else names.get(kind, "a device")


def split_of(*names: str) -> str:
    """The split that a word in one of some names means, the first name first; "" if none does."""
    words = (word for name in names for word in re.findall("[a-z]+", name.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def keep_splits(labels: Labels) -> None:
    """Keeps the splits of the source only if there are several; one split says nothing."""
    splits = {image.split for image in labels.images} - {""}
    if len(splits) == 1:
        labels.note("splits of the source are left out, because there is only one", *splits)
    if len(splits) < 2:
        for image in labels.images:
            image.split = ""


def unknown_layout(source: Path, looked_for: str) -> UserError:
    """The error for a source without a file of a format."""
    paths = sorted(files_below(source), key=lambda path: path.suffix.lower() in SUFFIXES)
    files = [path.relative_to(source).as_posix() for path in paths]  # images last
    more = f" and {len(files) - 5} more files" if len(files) > 5 else ""
    found = ", ".join(files[:5]) + more if files else "no files"
    return UserError(f"'{source}': looked for {looked_for}; found {found}")


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
