"""Text in drawings: letters of many scripts, and names that fit."""

import unicodedata

import cv2
import numpy as np
import pytest

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_plus.evaluation import text as text_module
from mask_rcnn_plus.evaluation.text import (
    class_name,
    drawable,
    shortened,
    text_size,
    write_text,
)

OPENCV_5 = int(cv2.__version__.split(".")[0]) >= 5
CAT = "\N{CJK UNIFIED IDEOGRAPH-732B}"
GEORGIAN = (
    "\N{GEORGIAN LETTER KAN}\N{GEORGIAN LETTER AN}"  # not in OpenCV's font, but in matplotlib's
)
HEBREW = "\N{HEBREW LETTER LAMED}\N{HEBREW LETTER FINAL MEM}"
THAI = "\N{THAI CHARACTER KO KAI}"  # in neither
ACCENTED = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"


def drawing(text: str, scale: float = 0.45) -> np.ndarray:
    width, height = text_size(text, scale)
    image = np.full((height, width, 3), 255, np.uint8)
    write_text(image, text, (0, 0), (0, 0, 0), scale)
    return image


@pytest.mark.skipif(not OPENCV_5, reason="OpenCV 4 draws only ASCII")
def test_names_in_any_script_are_drawn(caplog: pytest.LogCaptureFixture) -> None:
    for name in (CAT, ACCENTED, "\N{CYRILLIC CAPITAL LETTER KA}", GEORGIAN):
        assert class_name(["thing", name], 1) == name
        image, unknown = drawing(name), drawing("?" * len(name))
        assert (image < 128).any()
        assert image.shape != unknown.shape or (image != unknown).any()
    assert class_name([unicodedata.normalize("NFD", ACCENTED)], 0) == ACCENTED
    assert not caplog.records
    assert class_name(["thing"], 5) == class_name(["thing", ""], 5) == "class 5"


def test_a_name_without_a_font_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text_module, "_font_with", lambda letters: None)
    text_module.drawable.cache_clear()
    for _ in range(3):
        assert class_name(["thing", THAI], 1) == "class 1"
    (record,) = caplog.records
    assert "class 1" in record.message and "install" in record.message


def test_an_opencv_without_the_letters(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenCV 4 has only ASCII: other fonts are used, then names without accents."""
    monkeypatch.setattr(text_module, "_opencv_has", str.isascii)
    text_module.drawable.cache_clear()
    assert drawable(ACCENTED, otherwise="") == ACCENTED
    assert (drawing(ACCENTED) < 128).any()
    monkeypatch.setattr(text_module, "_font_with", lambda letters: None)
    text_module.drawable.cache_clear()
    assert drawable(ACCENTED, otherwise="") == "cafe"
    assert drawable(CAT, otherwise="class 2") == "class 2"
    assert len(caplog.records) == 1
    text_module.drawable.cache_clear()


def test_right_to_left_letters_are_drawn_in_order() -> None:
    text_module.drawable.cache_clear()
    if not text_module.features.check("raqm"):
        assert drawable(HEBREW, otherwise="class 0") == "class 0"
        return
    first = HEBREW[0]
    assert drawable(HEBREW, otherwise="") == HEBREW
    word, right = (drawing(letters, 2) for letters in (HEBREW, first))
    ink = np.flatnonzero((right < 128).any(axis=(0, 2)))
    wide = np.flatnonzero((word < 128).any(axis=(0, 2)))
    width = ink[-1] - ink[0] + 1
    edge = word[:, wide[-1] + 1 - width : wide[-1] + 1]
    alone = right[:, ink[0] : ink[-1] + 1]
    assert (np.abs(edge.astype(int) - alone) > 64).mean() < 0.05


def test_control_characters_are_not_drawn() -> None:
    assert drawable("a\x1b[31m\nb", otherwise="") == "a\\x1b[31m b"


def test_long_names_lose_their_middle() -> None:
    name = "a_very_long_name_of_a_file_0123.png"
    short = shortened(name, 120)
    assert text_size(short)[0] <= 120
    begin, end = short.split("...")
    assert name.startswith(begin) and name.endswith(end) and len(end) >= 4
    assert shortened(name, 1000) == name and shortened("", 5) == ""
    assert text_size(shortened(name, 0))[0] < 40
