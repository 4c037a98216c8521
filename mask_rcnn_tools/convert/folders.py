"""Pairs files of the same name in the folders of a source, and reports unknown files."""

from collections.abc import Iterable
from pathlib import Path

from mask_rcnn_plus.data.file_names import similar_name
from mask_rcnn_plus.data.formats import conversion_hint
from mask_rcnn_tools.convert.labels import SUFFIXES, Labels

# Endings of files that are often beside labels and contain no labels.
_COMPANIONS = {
    *(".txt", ".md", ".rst", ".yaml", ".yml", ".html", ".ini", ".db", ".log", ".cache"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm"),
}


class Stems:
    """Files by their path without the ending, to pair images with masks and label files.

    Args:
        folder: the folder that the paths are relative to.
        files: files below it. Of files that differ only in their ending, the first counts.
        labels: collects what is skipped and noted.
    """

    def __init__(self, folder: Path, files: Iterable[Path], labels: Labels) -> None:
        self.paths: dict[str, Path] = {}
        self._similar: dict[str, list[str]] = {}
        self._labels = labels
        for path in files:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in self.paths:
                labels.skip("files differ from another file only in the ending", path)
                continue
            self.paths[stem] = path
            self._similar.setdefault(similar_name(stem), []).append(stem)

    def find(self, stem: str) -> str | None:
        """The stem of the file that is meant: the same, or the only similar one."""
        if stem in self.paths:
            return stem
        similar = self._similar.get(similar_name(stem), [])
        if len(similar) != 1:
            return None
        what = "files were paired by similar names (capitals, Unicode form, upload prefix)"
        self._labels.note(what, f"{stem}: {self.paths[similar[0]]}")
        return similar[0]


def report_unread(labels: Labels, files: Iterable[Path]) -> None:
    """Reports files that were not read, except images of supported formats.

    Args:
        labels: collects the reports.
        files: the files that were not read.
    """
    for path in sorted(files):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            continue
        if hint := conversion_hint(path):
            labels.skip("images have an unsupported format", f"{path} is {hint}")
        elif suffix in _COMPANIONS:
            labels.note("files are not labels and are left out", path)
        else:
            labels.skip(f"files have an unknown kind ({suffix or 'no ending'})", path)
