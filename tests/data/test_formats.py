"""The supported image formats; what an import leaves to the application."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import EpsImagePlugin, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from mask_rcnn_plus import UserError
from mask_rcnn_plus.data import generate_shapes
from mask_rcnn_plus.data.formats import (
    conversion_hint,
    endings,
    formats,
    limit_pixels,
    open_image,
)
from mask_rcnn_plus.data.pixels import read_image
from mask_rcnn_plus.engine import main
from mask_rcnn_plus.prediction.images import to_bgr

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "TIFF", "BMP", "WEBP", "GIF"])
def test_supported_images_are_read_as_detectron2_reads_them(tmp_path: Path, kind: str) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.bin", kind)
    read = read_image(str(tmp_path / "x.bin"), "BGR")
    assert np.array_equal(read, detection_utils.read_image(str(tmp_path / "x.bin"), "BGR"))
    assert read.shape == (9, 7, 3)


@pytest.fixture
def ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of Ghostscript."""
    calls: list[tuple] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: calls.append(args))
    return calls


def test_postscript_is_never_run(tmp_path: Path, ghostscript: list[tuple]) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(EPS)
    with pytest.raises(UserError, match=r"x.png'.*JPEG, PNG"):
        read_image(str(path), "BGR")
    with pytest.raises(UnidentifiedImageError):
        open_image(path)
    with pytest.raises(UserError, match=r"x\.png"):
        to_bgr(path)
    assert not ghostscript and "EPS" not in formats()
    with contextlib.suppress(Exception):  # Ghostscript has painted nothing
        detection_utils.read_image(str(path), "BGR")
    assert ghostscript  # so the file would have been run


@pytest.mark.parametrize("split", ["train", "val"])
def test_neither_training_nor_evaluation_runs_postscript(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ghostscript: list[tuple],
    split: str,
) -> None:
    generate_shapes(tmp_path, num_train=2, num_val=1, image_size=(64, 64), progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "shapes" / "images" / f"{split}_000000.png").write_bytes(EPS)
    assert main(["--config-file", str(tiny_config)]) == 2
    assert f"{split}_000000.png" in (message := capfd.readouterr().err)
    assert "JPEG, PNG" in message
    assert not ghostscript


def test_all_images_are_opened_with_the_supported_formats() -> None:
    root = Path(__file__).parents[2]
    files = [*(root / "mask_rcnn_plus").rglob("*.py"), *(root / "mask_rcnn_tools").rglob("*.py")]
    unrestricted = re.compile(r"Image\.open\((?![^)\n]*formats=)|utils\.read_image\(|cv2\.imread\(")
    # The hook reads a preview that the run has drawn itself.
    assert [path.name for path in files if unrestricted.search(path.read_text())] == ["hooks.py"]


class _Heif(ImageFile.ImageFile):
    """Simulates an application's Pillow plugin: one green pixel."""

    format = "FAKE_HEIF"

    def _open(self) -> None:
        self._mode, self._size = "RGB", (1, 1)
        self.tile = []

    def load(self) -> None:
        self.im = Image.new("RGB", (1, 1), (0, 255, 0)).im


def test_an_applications_own_formats_keep_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "ID", Image.ID[:])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    Image.register_open(_Heif.format, _Heif, lambda prefix: prefix.startswith(b"fake heif"))
    path = tmp_path / "photo.heic"
    path.write_bytes(b"fake heif")
    with Image.open(path) as image:
        assert image.format == "FAKE_HEIF"
    assert detection_utils.read_image(str(path), "RGB").tolist() == [[[0, 255, 0]]]
    with pytest.raises(UserError, match=r"photo.heic' .*unsupported format.*heif-convert"):
        read_image(str(path))


def test_pillow_and_detectron2_are_unchanged() -> None:
    assert detection_utils.read_image.__module__ == "detectron2.data.detection_utils"
    assert Image.open.__module__ == "PIL.Image"


def test_every_ending_of_a_supported_format_is_known() -> None:
    common = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".tif", ".tiff")
    assert {*common, ".bmp", ".webp", ".avif", ".jp2", ".gif", ".tga", ".qoi"} <= set(endings())
    assert not {".eps", ".ps", ".pdf", ".heic", ".dng", ".mp4", ".txt", ""} & set(endings())


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("photo.HEIC", b"", "heif-convert"),
        ("photo.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF.*heif-convert"),
        ("photo.NEF", b"MM\0*", "camera raw.*darktable"),
        ("scan.pdf", b"%PDF-1.7", "pdftoppm"),
        ("drawing.svg", b"<svg/>", "rsvg-convert"),
        ("xray.dcm", b"\0" * 132, "DICOM.*dcm2img"),
        ("cells.czi", b"ZISRAWFILE", "bfconvert"),
    ],
)
def test_well_known_formats_say_how_to_convert_them(
    name: str, content: bytes, advice: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content + bytes(20))
    assert re.search(advice, conversion_hint(path))
    for read in (to_bgr, lambda path: read_image(str(path))):
        with pytest.raises(UserError, match=rf"{name}.*{advice}"):
            read(path)
    assert conversion_hint(tmp_path / "photo.png") == ""


def test_the_preview_in_a_raw_photo_is_not_taken_for_the_photo(tmp_path: Path) -> None:
    dng = TiffImagePlugin.ImageFileDirectory_v2()
    dng[50706] = b"\1\4\0\0"  # DNGVersion
    Image.new("RGB", (8, 6)).save(tmp_path / "a.tif", tiffinfo=dng)
    Image.new("RGB", (8, 6)).save(tmp_path / "b.nef", "TIFF")
    for name in ("a.tif", "b.nef"):
        with pytest.raises(UnidentifiedImageError):
            open_image(tmp_path / name)


def test_an_image_above_the_limit_names_the_limit_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    for read in (to_bgr, lambda path: read_image(str(path))):
        with pytest.raises(
            UserError, match=r"large\.png.* 1,200 .* 1,000.*--max-pixels.*INPUT\.MAX_PIXELS"
        ):
            read(tmp_path / "large.png")
    limit_pixels(0)
    assert Image.MAX_IMAGE_PIXELS == 500
    limit_pixels(1200)
    assert to_bgr(tmp_path / "large.png").shape == (30, 40, 3)
