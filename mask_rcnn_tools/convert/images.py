"""Opens the images that label files name, each once, and reports the other files of a source."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data.file_names import ImageFiles
from mask_rcnn_tools.convert.folders import report_unread
from mask_rcnn_tools.convert.labels import LabelledImage, Labels, files_below, images_below


class NamedImages:
    """The images of a source.

    Args:
        source: the folder of the label files, or the only label file.
        images: the folder of the images; None if they are in the folder of the label files.
        labels: collects what is skipped and noted.

    Attributes:
        top: the folder of the images.
    """

    def __init__(self, source: Path, images: Path | None, labels: Labels) -> None:
        self.top = images or (source if source.is_dir() else source.parent)
        self._source = source
        self._labels = labels
        self._files = ImageFiles(self.top)
        self._seen: set[Path] = set()

    def open_named(
        self,
        name: str,
        where: object,
        near: Path | None = None,
        *,
        size: tuple[Any, Any] = (None, None),
        remedy: str = "--images FOLDER names their folder",
    ) -> LabelledImage | None:
        """An image, still without objects; None if it is skipped.

        Its name is relative to ``near`` if its file is there, otherwise to its root.

        Args:
            name, near: as in ``ImageFiles.find``; near is a real path.
            where: the place of the name in the label files, for messages.
            size: width and height when the image was labelled; ignored unless both are integers.
            remedy: what to do about missing images.
        """
        file = self._labels.find_file(self._files, name, where, near, remedy)
        if file is None:
            return None
        where = f"{where}: '{name}'"
        if file in self._seen:
            self._labels.skip("images are labelled twice; the first labels count", where)
            return None
        self._seen.add(file)
        inside = near is not None and file.is_relative_to(near)
        new_name = file.relative_to(near).as_posix() if near and inside else ""
        image = self._labels.open_image(file, new_name or self._files.name_of(file))
        if image is None or size == (image.width, image.height):
            return image
        if {*map(type, size)} != {int}:
            return image
        self._labels.skip(
            "images have a different size than when they were labelled",
            f"{where}: {size[0]} x {size[1]}, now {image.width} x {image.height}",
        )
        return None

    def report_rest(self, read: Iterable[Path]) -> None:
        """Notes names that differ from their files, images without labels, and unknown files.

        Args:
            read: the label files.
        """
        self._labels.note_names(self._files)
        for path in images_below(self.top):
            if path.resolve() not in self._seen:
                self._labels.note("images without labels are left out", path)
        if self._source.is_dir():
            report_unread(self._labels, set(files_below(self._source)) - set(read))
