"""What a reader finds in another tool's files: images, their objects, and what it passes over."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

_EXAMPLES = 3

Item = TypeVar("Item")


@dataclass
class Thing:
    """An object: the union of its polygons and its mask.

    Attributes:
        label: the name of its class.
        polygons: [x0, y0, x1, y1, ...] each, in pixels of the image as it is seen (upright), from
            the corner of the first pixel.
        rle: COCO's run lengths, of the image's size; None for an object of polygons alone.
        flags: what else was ticked.
    """

    label: str
    polygons: list[list[float]] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    flags: list[str] = field(default_factory=list)


@dataclass
class Picture:
    """An image and its objects.

    Attributes:
        name: its path within the data set's image folder, "/" between folders.
        height, width: as it is seen, in pixels.
        path: its file; None where there is none, and ``content`` gives its bytes.
        content: makes the file's bytes.
        orientation: EXIF's, 1 to 8.
        things: its objects, perhaps none.
        split: which set the source puts it in; "" if the source does not say.
        flags: what was ticked of it as a whole.
    """

    name: str
    height: int
    width: int
    path: Path | None = None
    content: Callable[[], bytes] | None = None
    orientation: int = 1
    things: list[Thing] = field(default_factory=list)
    split: str = ""
    flags: list[str] = field(default_factory=list)


@dataclass
class Found:
    """What was found, and what was not converted.

    Attributes:
        pictures: in the order of their names.
        classes: the names of all classes in their order, where the source gives one.
        skipped: what went wrong -> where, of what should have become part of the data set.
        noted: the same of what has no place in it, or was done on the way.
    """

    pictures: list[Picture] = field(default_factory=list)
    classes: list[str] | None = None
    skipped: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, what: str, where: object) -> None:
        """Counts something that is lost.

        Args:
            what: of several: "files are no json".
            where: the one, with its detail.
        """
        self.skipped.setdefault(what, []).append(str(where))

    def note(self, what: str, where: object) -> None:
        """Counts something that is as it should be, but worth knowing; as ``skip``."""
        self.noted.setdefault(what, []).append(str(where))

    def lines(self) -> list[str]:
        """What was skipped and noted, for people."""
        lines = []
        for title, group in (("skipped", self.skipped), ("note", self.noted)):
            for what, places in group.items():
                lines.append(f"{title:9}{len(places):>6,} x  {what}")
                lines += [f"{'':20}{_plain(place)}" for place in places[:_EXAMPLES]]
                if len(places) > _EXAMPLES:
                    lines.append(f"{'':20}... {len(places) - _EXAMPLES:,} more")
        return lines


def with_bar(items: Iterable[Item], what: str, *, progress: bool) -> Iterator[Item]:
    """Goes through items, with a bar on standard error where that takes longer than two seconds."""
    items = list(items)
    return iter(
        tqdm(
            items,
            desc=what,
            delay=2,
            leave=False,
            file=sys.stderr,
            disable=not progress or None,  # None: only on a terminal
        )
    )


def _plain(text: str) -> str:
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:197]}..."
