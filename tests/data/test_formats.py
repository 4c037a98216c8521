"""Which files detectron2 reads as images once this project is imported."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import EpsImagePlugin, Image

from mask_rcnn_plus import UserError
from mask_rcnn_plus.data import formats

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "TIFF", "BMP", "WEBP", "GIF"])
def test_images_are_read_as_before(tmp_path: Path, kind: str) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.bin", kind)
    read = detection_utils.read_image(str(tmp_path / "x.bin"), "BGR")
    inner = detection_utils.read_image.__wrapped__
    assert np.array_equal(read, inner(str(tmp_path / "x.bin"), "BGR"))
    assert read.shape == (9, 7, 3)


def test_postscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(EPS)
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: ran.append(a))
    with pytest.raises(UserError, match="is none that is read: JPEG, PNG"):
        detection_utils.read_image(str(tmp_path / "x.png"), "BGR")
    assert not ran
    with contextlib.suppress(Exception):  # for nothing was painted
        detection_utils.read_image.__wrapped__(str(tmp_path / "x.png"), "BGR")
    assert ran  # so the file would have been


def test_it_wraps_once() -> None:
    before = detection_utils.read_image
    formats.restrict_detectron2()
    assert detection_utils.read_image is before
