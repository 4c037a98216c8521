"""What the data check says of one data set: its report, in words and as json."""

import json
import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mask_rcnn_tools.check.images import Entry
from mask_rcnn_tools.check.problems import ERROR, KINDS, SEVERITIES, Problem

_EXAMPLES = 5
_CLASSES = 20
_OF_THE_FILE = ("no-json", "no-coco", "no-images", "no-masks", "rle", "category-gap")


@dataclass
class Report:
    """What was found in a data set.

    Attributes:
        name: of the data set, or the json's path.
        json_file, image_root: where it lies.
        sha256: of the json.
        images, annotations: how many there are.
        classes: (name, annotations, of which crowds), in the order of their ids.
        problems: in the order of their kind.
        statistics: further lines, e.g. on box sizes.
        sizes: (height, width) of each image file that was read, by its index in the json.
        shapes: (width, height of a box, width, height of its image), of a sample of the boxes.
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
    entries: list[Entry] = field(default_factory=list)

    def kinds(self, severity: str | None = None) -> Counter[str]:
        """How many problems there are of each kind, of one severity or of all."""
        return Counter(
            problem.kind
            for problem in self.problems
            if severity in (None, KINDS[problem.kind].severity)
        )

    def is_coco(self) -> bool:
        """Whether the json can be mended at all."""
        return not {"no-json", "no-coco"} & self.kinds().keys()

    def text(self, *, width: int = 0) -> str:
        """The report for a terminal.

        Args:
            width: of the lines; 0 takes the terminal's.
        """
        width = width or min(shutil.get_terminal_size((100, 0)).columns, 120)
        lines = [
            f"{self.name}: {_count(self.images, 'image')}, "
            f"{_count(self.annotations, 'annotation')}, "
            f"{_count(len(self.classes), 'class', 'classes')}  ({self.json_file})"
        ]
        groups: dict[str, list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault(problem.kind, []).append(problem)
        for severity in SEVERITIES:
            for kind, problems in groups.items():
                if KINDS[kind].severity == severity:
                    lines += ["", *self._group(severity, kind, problems, width)]
        if not self.kinds(ERROR):
            lines += ["", "no errors"]
        lines += ["", *self._classes(width), *self.statistics]
        return "\n".join(lines).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The whole report, for json."""
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

    def _group(self, severity: str, kind: str, problems: list[Problem], width: int) -> list[str]:
        about = KINDS[kind]
        # A remark on the whole file is noted once, of its first entry.
        number = "" if kind in _OF_THE_FILE else f"{len(problems):,} x"
        head = f"{severity:8}{kind:18}{number:>9}  "
        lines = textwrap.wrap(
            about.text, max(width, len(head) + 30), initial_indent=head, subsequent_indent=" " * 8
        )
        shown = [p for p in problems if p.detail][:_EXAMPLES]
        lines += [_cut(f"{'':10}{describe(problem)}", width) for problem in shown]
        if shown and len(problems) > len(shown):
            lines.append(f"{'':10}... {len(problems) - len(shown):,} more")
        if about.mended:
            lines.append(f"{'':8}repair: {about.mended}")
        return lines

    def _classes(self, width: int) -> list[str]:
        if not self.classes:
            return []
        listed = [
            f"{plain(name)} {count:,}" + (f" ({crowds:,} crowds)" if crowds else "")
            for name, count, crowds in self.classes[:_CLASSES]
        ]
        if len(self.classes) > _CLASSES:
            listed.append(f"and {len(self.classes) - _CLASSES} more")
        return textwrap.wrap("classes: " + ", ".join(listed), width, subsequent_indent="  ")


def describe(problem: Problem) -> str:
    """One problem as a sentence: which entry, of which image, and what is so."""
    if not problem.section:
        return f"it {problem.detail}"
    image = f"image {_quote(problem.image_id)}"
    if isinstance(problem.file_name, str):
        image += f" {_quote(problem.file_name)}"
    number = f"{problem.section}[{problem.position}]"
    if problem.section == "images":
        return f"{image} ({number}) {problem.detail}"
    what = "category" if problem.section == "categories" else "annotation"
    who = f"{what} {_quote(problem.id)} ({number})"
    if problem.section == "annotations":
        who += f" of {image}"
    return f"{who} {problem.detail}"


def plain(text: str) -> str:
    """A text of the json on one line of a terminal, whatever it holds."""
    return text if text.isprintable() else ascii(text)[1:-1]


def write_json(reports: list[Report], path: Path) -> None:
    """Writes reports with all their problems.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps([report.to_dict() for report in reports], indent=1) + "\n")


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= 2 * width else f"{line[: 2 * width - 3]}..."
