"""The result of checking one data set, as text and as JSON."""

import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mask_rcnn_plus.errors import printable
from mask_rcnn_tools.check.images import ImageEntry
from mask_rcnn_tools.check.problems import ERROR, KINDS, SEVERITIES, Problem

_MAX_EXAMPLES = 5
_MAX_CLASSES = 20
# Kinds that concern the whole file, though some are reported for its first entry.
_WHOLE_FILE = ("no-json", "no-coco", "no-images", "no-masks", "rle", "category-gap")


@dataclass
class CheckResult:
    """The result of checking a data set.

    Attributes:
        name: the name of the data set, or the path of the json.
        json_file, image_root: the json and the image folder.
        sha256: the SHA-256 of the json.
        images, annotations: their numbers in the json.
        classes: (name, number of annotations, number of crowds among them), in the order of the
            ids.
        problems: sorted by kind.
        statistics: more lines of text, for example about box sizes.
        sizes: (height, width) of each readable image file, by the image's position in the json.
        shapes: (width, height of a box, width, height of its image), for a sample of the boxes.
        entries: the images that have a file name.
    """

    name: str
    json_file: Path
    image_root: Path
    sha256: str
    images: int
    annotations: int
    classes: list[tuple[str, int, int]]
    problems: list[Problem]
    statistics: list[str] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    shapes: list[tuple[float, float, int, int]] = field(default_factory=list)
    entries: list[ImageEntry] = field(default_factory=list)

    def kinds(self, severity: str | None = None) -> Counter[str]:
        """Counts the problems of each kind, of one severity or of all."""
        kinds = (problem.kind for problem in self.problems)
        return Counter(kind for kind in kinds if severity in (None, KINDS[kind].severity))

    def is_coco(self) -> bool:
        """Whether the json is in COCO format, so that it can be repaired."""
        return not {"no-json", "no-coco"} & self.kinds().keys()

    def text(self, *, width: int = 0) -> str:
        """The result in lines of ``width`` characters, by default the terminal's width."""
        width = width or min(shutil.get_terminal_size((100, 0)).columns, 120)
        lines = [
            f"{self.name}: {_count(self.images, 'image')}, "
            f"{_count(self.annotations, 'annotation')}, "
            f"{_count(len(self.classes), 'class', 'classes')}  ({self.json_file})"
        ]
        groups: dict[str, list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault(problem.kind, []).append(problem)
        for kind in sorted(groups, key=lambda kind: SEVERITIES.index(KINDS[kind].severity)):
            lines += ["", *_group_lines(kind, groups[kind], width)]
        if not self.kinds(ERROR):
            lines += ["", "no errors"]
        lines += ["", *self._class_lines(width), *self.statistics]
        return "\n".join(lines).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The whole result, for JSON."""
        return {
            "name": self.name,
            "json_file": str(self.json_file),
            "image_root": str(self.image_root),
            "sha256": self.sha256,
            "images": self.images,
            "annotations": self.annotations,
            "classes": [
                {"name": name, "annotations": count, "crowds": crowds}
                for name, count, crowds in self.classes
            ],
            "statistics": self.statistics,
            "problems": [
                {**problem._asdict(), "severity": KINDS[problem.kind].severity}
                for problem in self.problems
            ],
        }

    def _class_lines(self, width: int) -> list[str]:
        if not self.classes:
            return []
        counts = [
            f"{printable(name)} {count:,}" + (f" ({crowds:,} crowds)" if crowds else "")
            for name, count, crowds in self.classes[:_MAX_CLASSES]
        ]
        if len(self.classes) > _MAX_CLASSES:
            counts.append(f"and {len(self.classes) - _MAX_CLASSES} more")
        return textwrap.wrap("classes: " + ", ".join(counts), width, subsequent_indent="  ")


def _group_lines(kind: str, problems: list[Problem], width: int) -> list[str]:
    """Describes the problems of one kind, with examples."""
    severity, text, repair = KINDS[kind]
    number = "" if kind in _WHOLE_FILE else f"{len(problems):,} x"
    head = f"{severity:8}{kind:18}{number:>9}  "
    lines = textwrap.wrap(
        text, max(width, len(head) + 30), initial_indent=head, subsequent_indent=" " * 8
    )
    examples = [problem for problem in problems if problem.detail][:_MAX_EXAMPLES]
    for problem in examples:
        line = f"{'':10}{describe(problem)}"
        lines.append(line if len(line) <= 2 * width else f"{line[: 2 * width - 3]}...")
    if examples and len(problems) > len(examples):
        lines.append(f"{'':10}... {len(problems) - len(examples):,} more")
    if repair:
        lines.append(f"{'':8}repair: {repair}")
    return lines


def describe(problem: Problem) -> str:
    """One problem as a sentence: the entry, its image, and what is wrong."""
    if not problem.section:
        return problem.detail
    image = f"image {_quote(problem.image_id)}"
    if isinstance(problem.file_name, str):
        image += f" {_quote(problem.file_name)}"
    index = f"{problem.section}[{problem.position}]"
    if problem.section == "images":
        return f"{image} ({index}) {problem.detail}"
    if problem.section == "categories":
        return f"category {_quote(problem.id)} ({index}) {problem.detail}"
    return f"annotation {_quote(problem.id)} ({index}) of {image} {problem.detail}"


def counted(kinds: Counter[str]) -> str:
    """A list such as "2 box-nan, 1 twin"."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
