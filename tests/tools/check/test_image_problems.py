"""Problems of image files, one file per kind; no file outside the folder is opened."""

import functools
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

from mask_rcnn_tools.check import images as images_module
from mask_rcnn_tools.check.cache import VERSION
from mask_rcnn_tools.check.checking import check_coco, note_leaks, repair_coco
from mask_rcnn_tools.check.images import Finder, ImageEntry, shared_images
from mask_rcnn_tools.check.result import CheckResult

Check = Callable[..., CheckResult]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header states this size, without pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def noise(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 50, 3)).save(path, format="JPEG", exif=exif)


def rotated_as_in_json(path: Path) -> None:
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


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n%%EndComments\nshowpage\n"

CASES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("unchanged", lambda path: None, ""),
    ("missing", Path.unlink, "file-missing"),
    ("empty", replaced(b""), "file-unreadable"),
    ("noise", replaced(noise(2000).tobytes()), "file-unreadable"),
    ("a web page", replaced(b"<html>not found</html>"), "file-unreadable"),
    ("half a header", replaced(png_of_size(50, 40)[:20]), "file-unreadable"),
    ("PostScript", replaced(EPS), "file-unreadable"),
    ("a pipe", pipe, "file-unreadable"),
    ("a folder", a_folder, "file-unreadable"),
    ("truncated", truncated, "file-truncated"),
    ("a bomb", replaced(png_of_size(50_000, 50_000)), "file-bomb"),
    ("another size", saved("RGB", "PNG", (60, 40)), "file-size"),
    ("rotated", rotated, "file-rotated"),
    ("rotated, as in the json", rotated_as_in_json, ""),
    ("1 pixel", saved("RGB", "PNG", (1, 40)), "file-thin"),
    ("16 bits", saved("I;16", "PNG"), "file-deep"),
    ("floats", saved("F", "TIFF"), "file-deep"),
    ("CMYK", saved("CMYK", "JPEG"), "file-cmyk"),
    ("alpha", saved("RGBA", "PNG"), "file-alpha"),
]


@pytest.mark.parametrize(
    ("damage", "kind"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_each_kind_of_image_problem_is_found(
    check: Check,
    valid: dict[str, Any],
    folder: Path,
    damage: Callable[[Path], None],
    kind: str,
) -> None:
    damage(folder / "images" / "a.png")
    result = check(valid, images="decode")
    found = [(p.kind, p.position, p.image_id, p.file_name) for p in result.problems]
    if kind == "file-thin":
        assert found.pop(0)[0] == "file-size"
    assert found == ([(kind, 0, 5, "a.png")] if kind else [])
    again = check(valid, images="decode")
    assert again.problems == result.problems


def test_the_size_is_corrected_if_the_annotations_fit(
    check: Check, valid: dict[str, Any], folder: Path
) -> None:
    saved("RGB", "PNG", (60, 45))(folder / "images" / "a.png")
    content = repair_coco(check(valid)).content
    assert (content["images"][0]["height"], content["images"][0]["width"]) == (45, 60)
    assert len(content["annotations"]) == 3
    saved("RGB", "PNG", (20, 40))(folder / "images" / "a.png")
    content = repair_coco(check(valid)).content
    assert [image["id"] for image in content["images"]] == [6]
    assert [annotation["id"] for annotation in content["annotations"]] == [3]


def test_only_decoding_finds_a_truncated_image(
    check: Check, valid: dict[str, Any], folder: Path
) -> None:
    truncated(folder / "images" / "a.png")
    assert check(valid, images="headers").problems == []
    assert [p.kind for p in check(valid, images="decode").problems] == ["file-truncated"]


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "sub/../../secret.png", "{out}/secret.png", "link.png", "door/secret.png"],
)
def test_nothing_outside_the_folder_is_opened(
    check: Check,
    valid: dict[str, Any],
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
    valid["images"][0]["file_name"] = name.format(out=outside)
    result = check(valid, images="decode")
    assert [(p.kind, p.position) for p in result.problems] == [("file-outside", 0)]
    assert opened == [str(folder / "images" / "sub" / "b.png")]
    assert [image["id"] for image in repair_coco(result).content["images"]] == [6]


def test_links_inside_the_folder_and_to_the_folder_are_valid(
    check: Check, valid: dict[str, Any], folder: Path
) -> None:
    images = folder / "images"
    (images / "a.png").rename(images / "sub" / "kept.png")
    (images / "a.png").symlink_to(images / "sub" / "kept.png")
    assert check(valid).problems == []
    images.rename(folder / "store")
    images.symlink_to(folder / "store")
    assert check(valid).problems == []
    valid["images"][0]["file_name"] = str(folder / "store" / "a.png")
    assert check(valid).problems == []


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "a" * 5000, "http://host/a.png", "."])
def test_invalid_file_names(tmp_path: Path, name: str) -> None:
    assert Finder(tmp_path).find(name).kind in ("file-missing", "file-outside", "file-unreadable")


def test_images_are_read_again_only_after_a_change(
    check: Check, valid: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = images_module.read_facts

    def spy(path: str, *, decode: bool) -> Any:
        opened.append(Path(path).name)
        return real(path, decode=decode)

    monkeypatch.setattr(images_module, "read_facts", spy)
    check(valid)
    assert sorted(opened) == ["a.png", "b.png"]
    check(valid)
    assert len(opened) == 2
    check(valid, images="decode")
    assert len(opened) == 4
    check(valid)
    assert len(opened) == 4
    saved("RGB", "PNG", (60, 40))(folder / "images" / "a.png")
    assert [p.kind for p in check(valid).problems] == ["file-size"]
    assert opened[4:] == ["a.png"]
    # The same length, but another time.
    file = folder / "images" / "sub" / "b.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    check(valid)
    assert opened[5:] == ["b.png"]


def test_a_json_is_inspected_again_only_after_a_change(
    check: Check, valid: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check(valid)
    with monkeypatch.context() as patch:
        patch.setattr("mask_rcnn_tools.check.checking.parse", None)
        again = check(valid)
        assert (again.problems, again.classes, again.shapes) == (
            first.problems,
            first.classes,
            first.shapes,
        )
    valid["annotations"][0]["iscrowd"] = 7
    assert [problem.kind for problem in check(valid).problems] == ["crowd-flag"]


@pytest.mark.parametrize("state", ["a file", "noise"])
def test_an_unusable_cache_changes_nothing(
    check: Check,
    valid: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    cache = tmp_path / "cache"
    valid["annotations"][0]["iscrowd"] = 7
    if state == "a file":
        cache.write_text("not a folder")
    else:
        check(valid)
        for file in cache.iterdir():
            file.write_text(json.dumps({"version": VERSION, "value": [[1], {"a": 2}]}))
    assert [problem.kind for problem in check(valid).problems] == ["crowd-flag"]


def test_images_in_two_data_sets_are_found(
    valid: dict[str, Any], folder: Path, write: Callable[[Any], Path]
) -> None:
    path = write(valid)
    other = folder / "other"
    other.mkdir()
    # One file has the same bytes and another name; one has the same length and one other byte.
    same = (folder / "images" / "a.png").read_bytes()
    (other / "z.png").write_bytes(same)
    near = bytearray((folder / "images" / "sub" / "b.png").read_bytes())
    near[len(near) // 2] ^= 1
    (other / "y.png").write_bytes(near)
    val = folder / "val.json"
    val.write_text(
        json.dumps(
            {
                **valid,
                "annotations": [],
                "images": [
                    {"id": 1, "file_name": "y.png", "height": 30, "width": 20},
                    {"id": 2, "file_name": "z.png", "height": 40, "width": 50},
                ],
            }
        )
    )
    results = [
        check_coco(path, folder / "images", name="train"),
        check_coco(val, other, name="val"),
    ]
    note_leaks(results)
    leaks = [p for p in results[0].problems if p.kind == "leak"]
    assert [(p.image_id, p.detail) for p in leaks] == [(5, "is also 'z.png' of val")]


def test_images_of_the_same_size_are_compared_without_trying_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncompressed images of one camera all have the same size."""
    names = [f"{number}.bmp" for number in range(100)]
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            text = f"{number:5} {folder[:3] if number else 'all'}"
            if number == 1:  # long files that differ only in the middle
                text = f"{folder[:3]:^10000}"
            (tmp_path / folder / name).write_text(text)
    entries = [ImageEntry(number, number, name, 1, 1) for number, name in enumerate(names)]
    hashed: list[str] = []
    for name in ("_hash_ends", "_hash_content"):
        real = getattr(images_module, name)
        spy = functools.partial(lambda real, path: hashed.append(path) or real(path), real)
        monkeypatch.setattr(images_module, name, spy)
    pairs = shared_images((tmp_path / "train", entries), (tmp_path / "val", entries))
    assert [(image.id, other.id) for image, other in pairs] == [(0, 0)]
    assert len(hashed) < 500
