"""The file that a name in a label file refers to."""

import unicodedata
from pathlib import Path

import pytest

from mask_rcnn_plus.data.file_names import ImageFiles

HASH = "0123456789abcdef0123456789abcdef"


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.mark.parametrize(
    ("name", "file", "how"),
    [
        ("train/1.jpg", "train/1.jpg", ""),
        (r"train\1.jpg", "train/1.jpg", ""),
        ("/content/ds/images/train/1.jpg", "train/1.jpg", "folder"),
        (r"D:\photos\train\1.jpg", "train/1.jpg", "folder"),
        ("D:1.jpg", "1.jpg", "folder"),
        ("images/images/1.jpg", "images/1.jpg", "folder"),
        ("images/1.jpg", "images/images/1.jpg", "folder"),
        ("https://host/data/1.jpg", "1.jpg", "folder"),
        ("../elsewhere/1.jpg", "1.jpg", "folder"),
        ("1.jpg", "deep/folder/1.jpg", "folder"),
        ("café.jpg", unicodedata.normalize("NFD", "café.jpg"), "Unicode"),
        (unicodedata.normalize("NFD", "/x/né/café.jpg"), "né/café.jpg", "Unicode"),
        ("IMG_1.JPG", "img_1.jpg", "capitals"),
        ("Train/1.jpg", "train/1.JPEG", "capitals"),
        ("1.tiff", "1.TIF", "capitals"),
        ("1a2b3c4d-cat.jpg", "cat.jpg", "upload"),
        ("/data/upload/7/1a2b3c4d-My%20cat.jpg", "My cat.jpg", "upload"),
        ("cat.jpg", "1a2b3c4d-cat.jpg", "upload"),
        (f"cat_jpg.rf.{HASH}.jpg", "cat.JPG", "upload"),
        ("cat.png", f"train/cat_png.rf.{HASH}.png", "upload"),
    ],
)
def test_a_name_that_fits_one_file_finds_it(name: str, file: str, how: str, tmp_path: Path) -> None:
    make(tmp_path, file, "other/2.jpg", ".hidden/1.jpg")
    files = ImageFiles(tmp_path)
    for _ in range(2):  # counted once
        found = files.find(name)
        assert found == (tmp_path / file).resolve() and files.name_of(found) == file
    assert [how in key and len(places) for key, places in files.resolved.items()] == [1] * bool(how)
    assert not files.ambiguous


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "..",
        "3.jpg",
        "val/1.jpg",
        "1.png",
        "train",
        "a\0b.jpg",
        "\ud800.jpg",
        "x" * 5000,
        "20240102-1.jpg",
    ],
)
def test_a_name_without_a_file_finds_nothing(name: str, tmp_path: Path) -> None:
    make(tmp_path, "train/1.jpg", "train/2.jpg")
    files = ImageFiles(tmp_path)
    assert files.find(name) is None
    assert not files.resolved and not files.ambiguous


def test_a_name_that_fits_several_files_finds_none(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg", "b/images/1.jpg")
    files = ImageFiles(tmp_path)
    assert files.find("1.jpg") is None
    assert [path.parent.name for path in files.ambiguous["1.jpg"]] == ["a", "b", "images"]
    # A longer common path decides, and so does the folder of the label file.
    assert files.find("x/b/1.jpg") == (tmp_path / "b" / "1.jpg").resolve()
    assert files.find("D:/x/1.jpg", near=tmp_path / "a") == (tmp_path / "a" / "1.jpg").resolve()
    assert files.find("images/1.jpg") == (tmp_path / "b/images/1.jpg").resolve()


def test_no_file_outside_the_folders_is_found(tmp_path: Path) -> None:
    make(tmp_path, "secret/1.jpg", "photos/2.jpg")
    (tmp_path / "photos" / "3.jpg").symlink_to(tmp_path / "secret" / "1.jpg")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    files = ImageFiles(tmp_path / "photos")
    outside = str(tmp_path / "secret" / "1.jpg")
    for name in ("../secret/1.jpg", outside, "3.jpg", "x/3.jpg", "3.JPG"):
        assert files.find(name) is None
    assert files.find("1.jpg", near=tmp_path / "secret") is None
    assert files.find("loop/2.jpg") == (tmp_path / "photos" / "2.jpg").resolve()


def test_several_folders(tmp_path: Path) -> None:
    make(tmp_path, "images/1.jpg", "labels/2.jpg")
    files = ImageFiles(tmp_path / "images", tmp_path / "labels")
    for name in ("1.jpg", "2.jpg", "/x/2.jpg"):
        found = files.find(name)
        assert found is not None and files.name_of(found) == name.rsplit("/", 1)[-1]
