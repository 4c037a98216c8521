"""Images of every kind become (H, W, 3), uint8, BGR, upright; errors name what is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from mask_rcnn_plus import UserError
from mask_rcnn_plus.prediction import to_bgr

RED = (200, 100, 50)  # RGB


def test_files_are_read_as_in_training_and_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = to_bgr(tmp_path / "turned.png")
    assert read.shape == (8, 6, 3)
    assert (read[0, 0] == RED[::-1]).all() and (read[7, 0] == 0).all()
    assert (read == detection_utils.read_image(str(tmp_path / "turned.png"), "BGR")).all()
    with Image.open(tmp_path / "turned.png") as image:
        assert (to_bgr(image) == read).all()


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_the_first_of_several_images_in_a_file_is_used(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    path = tmp_path / f"series{suffix}"
    first.save(path, save_all=True, append_images=[second])
    blue, green, red = to_bgr(path)[3, 4].astype(int)
    assert red > 240 > 15 > blue + green
    assert caplog.messages == [f"{path} contains several images: the first one is used"]
    caplog.clear()
    first.save(path)
    to_bgr(path)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *((".png", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        *((".tif", mode) for mode in ("RGB", "RGBA", "CMYK", "I;16")),
        *((".jpg", mode) for mode in ("RGB", "L", "CMYK")),
    ],
)
def test_every_mode_of_a_file(mode: str, suffix: str, tmp_path: Path) -> None:
    white = Image.new("RGB", (5, 4), (255, 255, 255))
    if mode == "I;16":
        white = Image.fromarray(np.full((4, 5), 65535, np.uint16))
        white.putpixel((0, 0), 257 * 100)
    else:
        white = white.convert(mode)
    white.save(tmp_path / f"white{suffix}")
    read = to_bgr(tmp_path / f"white{suffix}", sixteen_bit="full")
    assert read.shape == (4, 5, 3) and read.dtype == np.uint8
    assert (read[2, 2] == 255).all()
    assert mode != "I;16" or (read[0, 0] == 100).all()


def test_arrays() -> None:
    bgr = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert to_bgr(bgr) is bgr
    assert (to_bgr(bgr, array_format="RGB") == bgr[:, :, ::-1]).all()
    with_alpha = np.dstack([bgr, np.zeros((2, 4), np.uint8)])
    assert (to_bgr(with_alpha) == bgr).all()
    for grey in (bgr[:, :, 0], bgr[:, :, :1]):
        assert (to_bgr(grey) == bgr[:, :, :1]).all() and to_bgr(grey).shape == (2, 4, 3)
    assert (to_bgr(bgr.astype(np.uint16) * 256 + 255) == bgr).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "image is an array of float32: give uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        ([1, 2], "image is a list: give a path"),
        ("missing.jpg", "missing.jpg does not exist"),
        (Path("photos/missing.jpg"), "photos/missing.jpg does not exist"),
        (".", "is a folder"),
        ("a\0.jpg", "cannot be read"),
        ("a" * 300 + ".jpg", "cannot be read: File name too long"),
        (Image.new("RGB", (0, 5)), "image has 0 x 5 pixels"),
    ],
)
def test_an_unsupported_image_is_named(image: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_bgr(image)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), RED).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_text("")
    for name, message in (
        ("cut.png", "cannot be read"),
        ("text.jpg", "not an image"),
        ("empty.jpg", "an empty file"),
    ):
        with pytest.raises(UserError, match=rf"{name} .*{message}"):
            to_bgr(tmp_path / name)
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(UserError, match="cannot be read"):
        to_bgr(cut)  # not decoded yet


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
        to_bgr(tmp_path / "pipe.png")
