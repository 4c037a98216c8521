"""Training, evaluation and prediction see the same pixels, of every kind of image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg as detectron2_config
from detectron2.data import DatasetCatalog, DatasetMapper, transforms
from PIL import Image

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.data import SafeDatasetMapper, build_train_mapper, pixels
from mask_rcnn_plus.data.pixels import in_format, read_image, to_bgr
from mask_rcnn_plus.prediction import BatchPredictor
from tests.modeling import models

LOW, HIGH = 60, 200  # of a microscope's image, in a file of 16 bits


def grey(dtype: Any = np.uint16) -> np.ndarray:
    values = np.full((30, 40), LOW, dtype)
    values[10:20, 10:20] = HIGH
    return values


def save_big_endian(path: Path) -> None:
    Image.frombytes("I;16B", (40, 30), grey(">u2").tobytes()).save(path, "TIFF")


def save_pgm(path: Path) -> None:
    path.write_bytes(b"P5 40 30 65535\n" + grey(">u2").tobytes())


DEEP = {
    "png": lambda path: Image.fromarray(grey()).save(path, "PNG"),
    "tif": lambda path: Image.fromarray(grey()).save(path, "TIFF"),
    "big_endian.tif": save_big_endian,
    "pgm": save_pgm,
    "int.tif": lambda path: Image.fromarray(grey(np.int32)).save(path, "TIFF"),
    "float.tif": lambda path: Image.fromarray(grey(np.float32)).save(path, "TIFF"),
}
WIDE = ("int.tif", "float.tif")


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(
    ("rule", "low", "high"), [("image", 0, 255), ("50..250", 13, 191), ("full", 0, 1)]
)
def test_deep_images_are_scaled_by_the_rule(
    kind: str, rule: str, low: int, high: int, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind}"
    DEEP[kind](path)
    if rule == "full" and kind in WIDE:
        with pytest.raises(UserError, match=rf"a\.{kind}.*32 bits.*INPUT\.SIXTEEN_BIT"):
            read_image(str(path), sixteen_bit=rule)
        return
    read = read_image(str(path), sixteen_bit=rule)
    assert read.shape == (30, 40, 3) and read.dtype == np.uint8
    assert (read[0, 0] == low).all() and (read[15, 15] == high).all()
    assert np.array_equal(read, to_bgr(path, sixteen_bit=rule))
    with Image.open(path) as image:
        assert np.array_equal(read, to_bgr(image, sixteen_bit=rule))
    if kind not in WIDE:
        assert np.array_equal(read, to_bgr(grey(), sixteen_bit=rule))
        assert np.array_equal(read, to_bgr(grey()[:, :, None], sixteen_bit=rule))


def test_values_that_are_not_numbers_do_not_spoil_the_scale() -> None:
    values = grey(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    read = to_bgr(Image.fromarray(values))[:, :, 0]
    assert read[0, :3].tolist() == [0, 255, 0] and read[15, 15] == 255
    assert (to_bgr(Image.fromarray(np.full((4, 5), np.nan, np.float32))) == 0).all()
    assert (to_bgr(np.full((4, 5), 7, np.uint16)) == 0).all()


def test_colours_of_16_bits_are_reduced_to_8_as_pillow_reads_them() -> None:
    colours = np.arange(60, dtype=np.uint16).reshape(4, 5, 3) * 1000
    for rule in ("image", "full", "0..4095"):
        assert (to_bgr(colours, sixteen_bit=rule) == colours >> 8).all()


@pytest.mark.parametrize("rule", ["images", "5..5", "9..1", "0..", "0..inf", ""])
def test_an_unknown_rule_is_named(rule: str) -> None:
    with pytest.raises(UserError, match=r"INPUT\.SIXTEEN_BIT"):
        to_bgr(grey(), sixteen_bit=rule)


def pictures(folder: Path) -> list[Path]:
    """A file of each kind: colours, palette, grey, alpha, CMYK, turned, 16 and 32 bits."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    paths = []
    for mode in ("RGB", "L", "P", "1", "LA", "RGBA"):
        colours.convert(mode).save(folder / f"{mode}.png")
        paths.append(folder / f"{mode}.png")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    colours.save(folder / "turned.jpg", exif=exif)
    for kind, save in DEEP.items():
        save(folder / f"deep.{kind}")
        paths.append(folder / f"deep.{kind}")
    return [*paths, folder / "cmyk.jpg", folder / "turned.jpg"]


@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("rule", ["image", "20..220"])
def test_training_evaluation_and_prediction_see_the_same(
    format: str, rule: str, tmp_path: Path
) -> None:
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.SIXTEEN_BIT = format, rule
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RANDOM_FLIP = 64, "none"
    train, test = build_train_mapper(cfg), SafeDatasetMapper(cfg, is_train=False)
    predictor = BatchPredictor(
        model=models.build("fpn").eval(),
        resize=transforms.ResizeShortestEdge([64, 64], cfg.INPUT.MAX_SIZE_TEST),
        input_format=format,
        sixteen_bit=rule,
    )
    for path in pictures(tmp_path):
        trained_on = train({"file_name": str(path), "annotations": []})["image"]
        evaluated = test({"file_name": str(path)})["image"]
        predicted = predictor._to_input(to_bgr(path, sixteen_bit=predictor.sixteen_bit))["image"]
        assert torch.equal(trained_on, evaluated), path.name
        assert torch.equal(evaluated.float(), predicted), path.name
        assert evaluated.shape[0] == (1 if format == "L" else 3)


@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
def test_8_bit_images_are_read_as_detectron2_reads_them(format: str, tmp_path: Path) -> None:
    ours, theirs = get_cfg(), detectron2_config()
    for cfg in (ours, theirs):
        cfg.INPUT.FORMAT = format
    mappers = SafeDatasetMapper(ours, is_train=False), DatasetMapper(theirs, is_train=False)
    for path in pictures(tmp_path):
        if "deep" not in path.name:
            mine, stock = (mapper({"file_name": str(path)}) for mapper in mappers)
            assert mine.keys() == stock.keys()
            assert torch.equal(mine["image"], stock["image"]), path.name


def test_samples_equal_detectron2s(shapes: Path) -> None:
    """With objects, flips, resizing, and semantic labels in another file."""
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 80)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(shapes / "labels.png")
    mappers = SafeDatasetMapper(cfg, is_train=True), DatasetMapper(cfg, is_train=True)
    for record in DatasetCatalog.get("shapes_train"):
        record = {**record, "sem_seg_file_name": str(shapes / "labels.png")}
        samples = []
        for mapper in mappers:
            np.random.seed(3)
            samples.append(mapper(record))
        mine, stock = samples
        assert mine.keys() == stock.keys()
        assert torch.equal(mine["image"], stock["image"])
        assert torch.equal(mine["sem_seg"], stock["sem_seg"])
        fields, others = mine["instances"].get_fields(), stock["instances"].get_fields()
        assert fields.keys() == others.keys()
        assert torch.equal(fields["gt_boxes"].tensor, others["gt_boxes"].tensor)
        for a, b in zip(fields["gt_masks"].polygons, others["gt_masks"].polygons, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_configs_without_our_keys_read_with_the_defaults(tmp_path: Path) -> None:
    DEEP["png"](tmp_path / "a.png")
    sample = SafeDatasetMapper(detectron2_config(), is_train=False)(
        {"file_name": str(tmp_path / "a.png")}
    )
    assert sample["image"].min() == 0 and sample["image"].max() == 255


def test_strips_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [to_bgr(path) for path in pictures(tmp_path)]
    monkeypatch.setattr(pixels, "_STRIP", 90)
    for path, expected in zip(pictures(tmp_path), whole, strict=True):
        assert np.array_equal(to_bgr(path), expected), path.name


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UserError, match=r"INPUT\.FORMAT is 'YUV-BT.601'"):
        in_format(np.zeros((2, 2, 3), np.uint8), "YUV-BT.601")


def test_the_mapper_raises_pillows_limit_for_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    cfg = get_cfg()
    record = {"file_name": str(tmp_path / "large.png")}
    with pytest.raises(UserError, match=r"INPUT\.MAX_PIXELS"):
        SafeDatasetMapper(cfg, is_train=False)(record)
    cfg.INPUT.MAX_PIXELS = 1200
    assert SafeDatasetMapper(cfg, is_train=False)(record)["image"].shape[0] == 3
