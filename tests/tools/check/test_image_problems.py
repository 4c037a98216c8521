"""Image files: one a class of problem; nothing outside the folder is opened."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mask_rcnn_tools.check import Report, check_coco, mend, note_leaks, statistics
from mask_rcnn_tools.check import images as images_module
from mask_rcnn_tools.check.images import Entry
from mask_rcnn_tools.check.paths import Finder

Check = Callable[..., Report]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG's head that promises so many pixels, and no pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def noise(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 50, 3)).save(path, format="JPEG", exif=exif)


def turned_evenly(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(50, 40, 3)).save(path, format="JPEG", exif=exif)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-600])


def saved(mode: str, format: str, size: tuple[int, int] = (50, 40)) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.new(mode, size).save(path, format=format)

    return save


def replaced(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def special(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n%%EndComments\nshowpage\n"

CASES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("as it was", lambda path: None, ""),
    ("gone", Path.unlink, "file-missing"),
    ("empty", replaced(b""), "file-unreadable"),
    ("noise", replaced(noise(2000).tobytes()), "file-unreadable"),
    ("a web page", replaced(b"<html>not found</html>"), "file-unreadable"),
    ("half a header", replaced(png_of_size(50, 40)[:20]), "file-unreadable"),
    ("PostScript", replaced(EPS), "file-unreadable"),
    ("a pipe", special, "file-unreadable"),
    ("a folder", a_folder, "file-unreadable"),
    ("truncated", truncated, "file-truncated"),
    ("a bomb", replaced(png_of_size(50_000, 50_000)), "file-bomb"),
    ("another size", saved("RGB", "PNG", (60, 40)), "file-size"),
    ("turned", turned, "file-rotated"),
    ("turned, as the json says", turned_evenly, ""),
    ("1 pixel", saved("RGB", "PNG", (1, 40)), "file-thin"),
    ("16 bits", saved("I;16", "PNG"), "file-deep"),
    ("floats", saved("F", "TIFF"), "file-deep"),
    ("CMYK", saved("CMYK", "JPEG"), "file-cmyk"),
    ("alpha", saved("RGBA", "PNG"), "file-alpha"),
]


@pytest.mark.parametrize(("spoil", "kind"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_each_class_of_image_is_named(
    check: Check,
    sound: dict[str, Any],
    folder: Path,
    spoil: Callable[[Path], None],
    kind: str,
) -> None:
    spoil(folder / "images" / "a.png")
    report = check(sound, images="decode")
    found = [(p.kind, p.position, p.image_id, p.file_name) for p in report.problems]
    if kind == "file-thin":
        assert found.pop(0)[0] == "file-size"
    assert found == ([(kind, 0, 5, "a.png")] if kind else [])
    again = check(sound, images="decode")
    assert again.problems == report.problems


def test_another_size_is_set_right_where_the_annotations_fit(
    check: Check, sound: dict[str, Any], folder: Path
) -> None:
    saved("RGB", "PNG", (60, 45))(folder / "images" / "a.png")
    content = mend(check(sound)).content
    assert (content["images"][0]["height"], content["images"][0]["width"]) == (45, 60)
    assert len(content["annotations"]) == 3
    saved("RGB", "PNG", (20, 40))(folder / "images" / "a.png")
    content = mend(check(sound)).content
    assert [image["id"] for image in content["images"]] == [6]
    assert [annotation["id"] for annotation in content["annotations"]] == [3]


def test_headers_do_not_show_a_truncated_image(
    check: Check, sound: dict[str, Any], folder: Path
) -> None:
    truncated(folder / "images" / "a.png")
    assert check(sound, images="headers").problems == []
    assert [p.kind for p in check(sound, images="decode").problems] == ["file-truncated"]


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "sub/../../secret.png", "{out}/secret.png", "link.png", "door/secret.png"],
)
def test_nothing_outside_the_folder_is_opened(
    check: Check,
    sound: dict[str, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    outside = folder / "elsewhere"
    outside.mkdir()
    for place in (outside, folder):
        Image.new("RGB", (50, 40)).save(place / "secret.png")
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "door").symlink_to(outside)
    opened: list[str] = []
    real = images_module.read_facts

    def spy(path: str, *, decode: bool) -> Any:
        opened.append(path)
        return real(path, decode=decode)

    monkeypatch.setattr(images_module, "read_facts", spy)
    sound["images"][0]["file_name"] = name.format(out=outside)
    report = check(sound, images="decode")
    assert [(p.kind, p.position) for p in report.problems] == [("file-outside", 0)]
    assert opened == [str(folder / "images" / "sub" / "b.png")]
    assert [image["id"] for image in mend(report).content["images"]] == [6]


def test_links_within_the_folder_and_a_linked_folder_are_fine(
    check: Check, sound: dict[str, Any], folder: Path
) -> None:
    images = folder / "images"
    (images / "a.png").rename(images / "sub" / "kept.png")
    (images / "a.png").symlink_to(images / "sub" / "kept.png")
    assert check(sound).problems == []
    images.rename(folder / "store")
    images.symlink_to(folder / "store")
    assert check(sound).problems == []
    sound["images"][0]["file_name"] = str(folder / "store" / "a.png")
    assert check(sound).problems == []


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "a" * 5000, "http://host/a.png", "."])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    assert Finder(tmp_path).find(name).kind in ("file-missing", "file-outside", "file-unreadable")


def test_images_are_read_again_only_when_they_have_changed(
    check: Check, sound: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = images_module.read_facts

    def spy(path: str, *, decode: bool) -> Any:
        opened.append(Path(path).name)
        return real(path, decode=decode)

    monkeypatch.setattr(images_module, "read_facts", spy)
    check(sound)
    assert sorted(opened) == ["a.png", "b.png"]
    check(sound)
    assert len(opened) == 2
    check(sound, images="decode")
    assert len(opened) == 4
    check(sound)
    assert len(opened) == 4
    saved("RGB", "PNG", (60, 40))(folder / "images" / "a.png")
    assert [p.kind for p in check(sound).problems] == ["file-size"]
    assert opened[4:] == ["a.png"]
    # Of the same length, at another time.
    file = folder / "images" / "sub" / "b.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    check(sound)
    assert opened[5:] == ["b.png"]


def test_a_json_is_inspected_again_only_when_it_has_changed(
    check: Check, sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check(sound)
    with monkeypatch.context() as patch:
        patch.setattr("mask_rcnn_tools.check.checking.parse", None)
        again = check(sound)
        assert (again.problems, again.classes, again.shapes) == (
            first.problems,
            first.classes,
            first.shapes,
        )
    sound["annotations"][0]["iscrowd"] = 7
    assert [problem.kind for problem in check(sound).problems] == ["crowd-flag"]


@pytest.mark.parametrize("state", ["a file", "noise"])
def test_a_cache_that_cannot_be_used_changes_nothing(
    check: Check,
    sound: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    cache = tmp_path / "cache"
    sound["annotations"][0]["iscrowd"] = 7
    if state == "a file":
        cache.write_text("in the way")
    else:
        check(sound)
        for file in cache.iterdir():
            file.write_text('{"version": 1, "value": [[1], {"a": 2}]}')
    assert [problem.kind for problem in check(sound).problems] == ["crowd-flag"]


def test_images_in_two_sets_are_found(
    sound: dict[str, Any], folder: Path, write: Callable[[Any], Path]
) -> None:
    path = write(sound)
    other = folder / "other"
    other.mkdir()
    # The same bytes under another name; a file of the same length that differs in its middle.
    same = (folder / "images" / "a.png").read_bytes()
    (other / "z.png").write_bytes(same)
    near = bytearray((folder / "images" / "sub" / "b.png").read_bytes())
    near[len(near) // 2] ^= 1
    (other / "y.png").write_bytes(near)
    val = folder / "val.json"
    val.write_text(
        json.dumps(
            {
                **sound,
                "annotations": [],
                "images": [
                    {"id": 1, "file_name": "y.png", "height": 30, "width": 20},
                    {"id": 2, "file_name": "z.png", "height": 40, "width": 50},
                ],
            }
        )
    )
    reports = [
        check_coco(path, folder / "images", name="train"),
        check_coco(val, other, name="val"),
    ]
    note_leaks(reports)
    leaks = [p for p in reports[0].problems if p.kind == "leak"]
    assert [(p.image_id, p.detail) for p in leaks] == [(5, "is also 'z.png' of val")]


def test_images_of_one_length_are_told_apart_without_comparing_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a camera that does not compress them."""
    names = [f"{number}.bmp" for number in range(100)]
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(
                f"{number:5} {folder[:3] if number else 'all'}".encode()
            )
    entries = [Entry(number, number, name, 1, 1) for number, name in enumerate(names)]
    looked = []
    digest = statistics._digest
    monkeypatch.setattr(
        statistics, "_digest", lambda *arguments: looked.append(1) or digest(*arguments)
    )
    pairs = statistics.shared_images((tmp_path / "train", entries), (tmp_path / "val", entries))
    assert [(one.id, other.id) for one, other in pairs] == [(0, 0)]
    assert len(looked) < 500
