import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_plus.evaluation import PreviewSample, PreviewWriter, draw_preview
from mask_rcnn_plus.evaluation import preview as preview_module
from mask_rcnn_plus.evaluation.drawing import (
    DrawnObjects,
    Style,
    class_color,
    draw_objects,
    draw_styled,
    text_color,
    text_size,
)

GREY = 128
WHITE = 255


def boxes_of(*boxes: tuple, classes: Any = None, scores: Any = None, size: tuple) -> DrawnObjects:
    """Objects with masks that fill their boxes, in an image of the size (height, width)."""
    masks = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros(size, np.uint8, order="F")
        mask[y0:y1, x0:x1] = 1
        masks.append(mask_util.encode(mask))
    return DrawnObjects(
        boxes=np.array(boxes, float).reshape(-1, 4),
        classes=np.array(classes if classes is not None else [0] * len(boxes), int),
        scores=None if scores is None else np.array(scores, float),
        masks=masks,
    )


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def panels(picture: np.ndarray) -> list[tuple[slice, slice]]:
    """The rows and columns of the two panels in the preview of one grey image."""
    filled = (picture != WHITE).any(axis=2)
    # A panel fills its rows except for the gap; the text above the panels does not.
    rows = np.flatnonzero(filled.mean(axis=1) > 0.8)
    columns = np.flatnonzero(filled[rows].mean(axis=0) > 0.9)
    (gap,) = np.flatnonzero(np.diff(columns) > 1)
    row = slice(rows[0], rows[-1] + 1)
    left = slice(columns[0], columns[gap] + 1)
    right = slice(columns[gap + 1], columns[-1] + 1)
    return [(row, left), (row, right)]


def drawn(panel: np.ndarray) -> np.ndarray:
    """A mask of the pixels of a grey panel that were drawn on."""
    return (np.abs(panel.astype(int) - GREY) > 8).any(axis=2)


def test_ground_truth_is_on_the_left_and_prediction_on_the_right() -> None:
    size = (64, 64)
    sample = PreviewSample(
        grey(*size),
        "a.png",
        truth=boxes_of((0, 0, 32, 64), size=size),
        prediction=boxes_of((0, 32, 64, 64), scores=[0.9], size=size),
    )
    picture = draw_preview([sample], class_names=["thing"], max_side=320)
    left, right = (drawn(picture[place]) for place in panels(picture))
    assert left.shape == right.shape == (320, 320)
    # The mask covers half of each panel; the label may exceed it by a few rows.
    assert left[:, :155].all() and not left[30:, 170:].any()
    assert right[165:].all() and not right[:130].any()


@pytest.mark.parametrize(("size", "shown"), [((24, 48), (200, 400)), ((3000, 2250), (400, 300))])
def test_images_of_any_size_are_drawn_at_one_size(size: tuple, shown: tuple) -> None:
    none = boxes_of(size=size)
    picture = draw_preview([PreviewSample(grey(*size), "a", none, none)], class_names=())
    assert max(place.stop - place.start for place in panels(picture)[0]) == 480
    picture = draw_preview(
        [PreviewSample(grey(*size), "a", none, none)], class_names=(), max_side=400
    )
    assert picture[panels(picture)[0]].shape[:2] == shown


def test_predictions_below_the_threshold_are_left_out() -> None:
    size = (64, 64)
    both = boxes_of((0, 0, 30, 64), (40, 0, 64, 64), scores=[0.4, 0.6], size=size)
    sample = PreviewSample(grey(*size), "a", boxes_of(size=size), both)

    def covered(threshold: float) -> list[bool]:
        picture = draw_preview([sample], class_names=["a"], score_threshold=threshold)
        right = drawn(picture[panels(picture)[1]])
        return [bool(right[:, :200].all()), bool(right[:, 310:].all())]

    assert covered(0.5) == [False, True]
    assert covered(0.3) == [True, True]
    assert covered(0.6) == [False, True]
    assert covered(0.7) == [False, False]


def test_each_class_has_its_own_colour() -> None:
    colors = [class_color(index) for index in range(24)]
    assert len(set(colors)) == 24
    hues = cv2.cvtColor(np.array([colors[:6]], np.uint8), cv2.COLOR_BGR2HSV)[0, :, 0].astype(int)
    for i in range(6):
        for j in range(i):
            apart = abs(hues[i] - hues[j])
            assert min(apart, 180 - apart) > 10  # OpenCV's hues go to 180

    size = (64, 64)
    truth = boxes_of((0, 0, 64, 64), classes=[3], size=size)
    found = boxes_of((0, 0, 64, 64), classes=[3], scores=[0.9], size=size)
    other = boxes_of((0, 0, 64, 64), classes=[4], scores=[0.9], size=size)
    centres = []
    for prediction in (found, other):
        picture = draw_preview(
            [PreviewSample(grey(*size), "a", truth, prediction)], class_names="abcde"
        )
        centres.append([picture[rows, columns][240, 240] for rows, columns in panels(picture)])
    assert (centres[0][0] == centres[0][1]).all() and (centres[0][0] == centres[1][0]).all()
    assert (centres[1][0] != centres[1][1]).any()


def test_labels_need_room_on_their_objects() -> None:
    size = (256, 256)

    def labelled(*boxes: tuple, crowded: bool = False) -> bool:
        """Whether a longer class name changes the drawing."""
        objects = boxes_of(*boxes, scores=[0.97] * len(boxes), size=size)
        return not np.array_equal(
            *(
                draw_objects(grey(*size), objects, [name], (512, 512), crowded=crowded)
                for name in ("bolt", "bolts")
            )
        )

    assert labelled((50, 50, 120, 120))
    assert not labelled((50, 50, 60, 60))
    assert not labelled((50, 50, 120, 120), crowded=True)


def test_labels_do_not_cover_each_other() -> None:
    size = (256, 256)
    best, second = (100, 100, 180, 180), (120, 95, 190, 170)
    width, height = text_size("screw 0.90")
    label = (slice(100 - height, 100), slice(100, 100 + width))
    alone = boxes_of(best, scores=[0.9], size=size)
    both = boxes_of(second, best, scores=[0.8, 0.9], size=size)
    canvases = [
        draw_objects(grey(*size), objects, ["screw"], size, crowded=False)
        for objects in (alone, both)
    ]
    assert drawn(canvases[0][label]).all()
    np.testing.assert_array_equal(canvases[1][label], canvases[0][label])


def test_labels_do_not_hide_objects() -> None:
    size = (300, 400)
    large, neighbours = (150, 100, 250, 200), ((150, 80, 250, 99), (150, 201, 250, 220))

    def label(*boxes: tuple, image: tuple = size) -> np.ndarray:
        """The pixels of the first object's label."""
        objects = boxes_of(*boxes, scores=[0.9] * len(boxes), size=image)
        others = [""] * (len(boxes) - 1)
        with_label, without = (
            draw_styled(grey(*image), objects, (), Style(small=True), labels=[text, *others])
            for text in ("screw 0.90", "")
        )
        return (with_label != without).any(axis=2)

    above = label(large)
    assert above[:100, 150:250].any() and not above[100:].any()
    below = label(large, neighbours[0])
    assert below[200:].any() and not below[:200].any()
    beside = label(large, *neighbours)
    assert beside[100:200].any() and not beside[:, 150:250].any()
    # In the corner of an object as large as the image, not on the small object in it.
    inside = label((0, 0, 400, 300), (0, 0, 60, 20))
    assert inside.any() and not inside[:20, :60].any()
    # No label rather than one that covers half of an object.
    assert not label((0, 0, 110, 40), image=(40, 110)).any()


def test_many_objects_get_outlines_without_boxes() -> None:
    size = (256, 256)
    disc = np.zeros(size, np.uint8)
    cv2.circle(disc, (128, 128), 100, 1, -1)
    mask = mask_util.encode(np.asfortranarray(disc))
    one = DrawnObjects(np.array([[28.0, 28, 229, 229]]), np.array([0]), np.array([0.9]), [mask])
    corner = (slice(28, 40), slice(28, 40))  # in the box, outside of the disc

    def corner_drawn(objects: DrawnObjects, crowded: bool) -> bool:
        canvas = draw_objects(grey(*size), objects, ["a"], size, crowded=crowded)
        assert drawn(canvas)[128, 128] == (objects.masks is not None)
        return bool(drawn(canvas[corner]).any())

    assert corner_drawn(one, crowded=False)
    assert not corner_drawn(one, crowded=True)
    bare = DrawnObjects(one.boxes, one.classes, one.scores)
    assert corner_drawn(bare, crowded=True)


@pytest.mark.parametrize(("others", "alike"), [(38, True), (60, False)])
def test_an_object_slightly_larger_than_its_neighbours_looks_like_them(
    others: int, alike: bool
) -> None:
    size = (128, 400)
    squares = [(10 + 100 * k, 10, 10 + 100 * k + side, 90) for k, side in enumerate([others] * 3)]
    objects = boxes_of(*squares, (310, 10, 352, 90), size=size)
    style = Style(boxes=False, labels=False, edged=True)
    dark = (draw_styled(grey(*size), objects, ["a"], style) < 60).all(axis=2)
    assert dark[:, 300:].any() != alike  # the edge of a wide outline
    assert dark[:, :300].any() != alike
    # A much larger object may have the edge.
    objects = boxes_of(*squares, (310, 10, 392, 128), size=size)
    dark = (draw_styled(grey(*size), objects, ["a"], style) < 60).all(axis=2)
    assert dark[:, 300:].any()


def test_overlapping_objects_are_both_visible() -> None:
    size = (128, 128)
    objects = boxes_of((40, 40, 80, 80), (0, 0, 128, 128), classes=[0, 1], size=size)
    canvas = draw_objects(grey(*size), objects, ["a", "b"], size, crowded=True)
    small, large = canvas[60, 60].astype(int), canvas[100, 100].astype(int)
    assert np.abs(small - large).max() > 30


def test_all_mask_formats_are_drawn_alike() -> None:
    bitmap = np.zeros((40, 60), np.uint8)
    bitmap[10:30, 20:50] = 1
    rle = mask_util.encode(np.asfortranarray(bitmap))
    # Runs by columns: 20 empty columns, then 30 columns with 10 off, 20 on, 10 off.
    counts = [20 * 40 + 10, *[20, 20] * 29, 20, 10 + 10 * 40]
    polygon = [[20.0, 10, 50, 10, 50, 30, 20, 30]]
    ways = [bitmap, rle, {"size": [40, 60], "counts": counts}, polygon]
    common = {"bbox": [20, 10, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    objects = DrawnObjects.from_annotations([{**common, "segmentation": w} for w in ways], 40, 60)
    assert objects.masks is not None
    for mask in objects.masks:
        np.testing.assert_array_equal(mask_util.decode(mask), bitmap)
    np.testing.assert_array_equal(objects.boxes, [[20, 10, 50, 30]] * 4)
    np.testing.assert_array_equal(objects.classes, [2] * 4)


def test_crowds_and_missing_masks() -> None:
    common = {"bbox": [2, 2, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    masked = {**common, "segmentation": [[2, 2, 9, 2, 9, 9]]}
    assert len(DrawnObjects.from_annotations([masked, {**masked, "iscrowd": 1}], 16, 16)) == 1
    assert DrawnObjects.from_annotations([masked, common], 16, 16).masks is None
    assert len(DrawnObjects.from_annotations([], 16, 16)) == 0


def test_text_is_legible_on_every_class_colour() -> None:
    for index in range(24):
        background, text = class_color(index), text_color(class_color(index))
        luminance = [0.114 * b + 0.587 * g + 0.299 * r for b, g, r in (background, text)]
        assert abs(luminance[0] - luminance[1]) > 100


def test_the_grid_of_pairs_is_a_little_wider_than_high() -> None:
    none = boxes_of(size=(32, 32))
    shapes = {}
    for count in (1, 2, 6, 12):
        samples = [PreviewSample(grey(32, 32), "a", none, none)] * count
        height, width, _ = draw_preview(samples, class_names=(), max_side=200).shape
        shapes[count] = width / height
    assert all(0.7 < ratio < 2.2 for ratio in shapes.values()), shapes
    with pytest.raises(ValueError, match="at least one"):
        draw_preview([], class_names=())


Registered = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Registered]:
    names = []

    def _register(count: int, *, empty: tuple[int, ...] = ()) -> tuple[str, list[dict[str, Any]]]:
        records = []
        for i in range(count):
            path = tmp_path / f"image{i}.png"
            cv2.imwrite(str(path), grey(48, 64))
            annotation = {
                "bbox": [8, 8, 24, 24],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [[8, 8, 32, 8, 32, 32, 8, 32]],
            }
            records.append(
                {
                    "file_name": str(path),
                    "image_id": 10 * i,
                    "height": 48,
                    "width": 64,
                    "annotations": [] if i in empty else [annotation],
                }
            )
        name = f"test_preview_{tmp_path.name}"
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).thing_classes = ["square"]
        names.append(name)
        return name, records

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def output_for(record: dict[str, Any]) -> dict[str, Instances]:
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor([[8.0, 8, 32, 32]]))
    instances.pred_classes = torch.tensor([0])
    instances.scores = torch.tensor([0.9])
    instances.pred_masks = torch.zeros(1, record["height"], record["width"], dtype=torch.bool)
    instances.pred_masks[0, 8:32, 8:32] = True
    return {"instances": instances}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The writer's log, even if an earlier test has detached its logger from the root."""
    logger = logging.getLogger("mask_rcnn_plus.evaluation.preview")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def names_drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images of the last preview."""
    names: list[str] = []

    def spy(samples: Any, **kwargs: Any) -> np.ndarray:
        names[:] = [sample.name for sample in samples]
        return draw_preview(samples, **kwargs)

    monkeypatch.setattr(preview_module, "draw_preview", spy)
    return names


def run(writer: PreviewWriter, records: list[dict[str, Any]]) -> Any:
    writer.reset()
    for record in records:
        writer.process([record], [output_for(record)])
    return writer.evaluate()


def test_writes_the_picture_and_adds_no_metric(register: Registered, tmp_path: Path) -> None:
    name, records = register(3)
    writer = PreviewWriter(name, str(tmp_path / "not" / "there yet"), num_images=2)
    assert writer.path is None
    assert run(writer, records) == {}
    assert writer.path == tmp_path / "not" / "there yet" / f"preview_{name}.png"
    picture = cv2.imread(str(writer.path))
    assert drawn(picture).any() and picture.shape[1] > 900


def test_images_are_spread_over_those_with_objects(
    register: Registered, tmp_path: Path, names_drawn: list[str]
) -> None:
    name, records = register(12, empty=(0, 4, 5))
    # Nine images have objects: 1 2 3 | 6 7 8 | 9 10 11. The middles of the thirds are 2, 7 and 10.
    writer = PreviewWriter(name, str(tmp_path), num_images=3)
    run(writer, records)
    assert names_drawn == ["image2.png", "image7.png", "image10.png"]
    run(writer, records[::-1])  # in any order
    assert names_drawn == ["image2.png", "image7.png", "image10.png"]
    run(PreviewWriter(name, str(tmp_path), num_images=50), records)
    assert len(names_drawn) == 9
    run(writer, records[:8])  # part of the set
    assert names_drawn == ["image2.png", "image7.png"]


def test_a_set_without_objects_is_drawn_too(
    register: Registered, tmp_path: Path, names_drawn: list[str]
) -> None:
    name, records = register(2, empty=(0, 1))
    run(PreviewWriter(name, str(tmp_path), num_images=2), records)
    assert names_drawn == ["image0.png", "image1.png"]


def test_without_images_there_is_no_picture(
    register: Registered, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    name, records = register(2)
    for writer, seen in (
        (PreviewWriter(name, str(tmp_path / "out"), num_images=0), records),
        (PreviewWriter(name, str(tmp_path / "out"), num_images=2), []),
    ):
        assert run(writer, seen) == {}
        assert writer.path is None
    assert not (tmp_path / "out").exists()
    assert log.text == ""


def test_outputs_and_data_set_do_not_change(register: Registered, tmp_path: Path) -> None:
    name, records = register(1)
    output, fresh = output_for(records[0]), output_for(records[0])
    before = repr(records)
    writer = PreviewWriter(name, str(tmp_path), num_images=1)
    writer.process(records, [output])
    writer.evaluate()
    assert repr(records) == before
    assert torch.equal(output["instances"].pred_masks, fresh["instances"].pred_masks)
    assert output["instances"].pred_masks.dtype == torch.bool


def test_a_failed_picture_does_not_fail_the_evaluation(
    register: Registered, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    name, records = register(1)
    writer = PreviewWriter(name, str(tmp_path), num_images=1)
    Path(records[0]["file_name"]).unlink()
    assert run(writer, records) == {}
    assert writer.path is None
    assert "Could not draw the preview" in log.text


def test_a_full_disk_leaves_no_part_of_the_picture(
    register: Registered, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    name, records = register(1)
    writer = PreviewWriter(name, str(tmp_path / "out"), num_images=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert run(writer, records) == {}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.path is None and "Could not draw the preview" in log.text
    assert not list((tmp_path / "out").iterdir())


def test_exif_rotated_images_are_drawn_upright(register: Registered, tmp_path: Path) -> None:
    name, records = register(1)
    # Stored 64 high and 48 wide; EXIF rotates it by 90 degrees: 48 high, 64 wide.
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(grey(64, 48)).save(path, exif=exif)
    records[0]["file_name"] = str(path)
    writer = PreviewWriter(name, str(tmp_path), num_images=1)
    run(writer, records)
    picture = cv2.imread(str(writer.path))
    for place in panels(picture):
        panel = picture[place]
        assert panel.shape[:2] == (360, 480)
        # The object is at (8, 8, 32, 32) of 64 x 48, drawn 7.5 times as large.
        assert drawn(panel)[70:230, 70:230].all() and not drawn(panel)[260:, 260:].any()


def test_an_overlap_shows_the_image_through_the_topmost_mask_only() -> None:
    size = (60, 80)
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    # The last mask is empty, as a model may predict it.
    corners = (0, 0, 80, 60), (10, 10, 50, 50), (30, 20, 60, 45), (5, 5, 5, 5)
    objects = boxes_of(*corners, size=size)
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    style = Style(boxes=False, labels=False, line=1)
    canvas = draw_styled(image, objects, ["a"], style, colors=colors)
    for place, color in (
        ((slice(3, 8), slice(3, 70)), colors[0]),
        ((slice(13, 48), slice(13, 28)), colors[1]),
        ((slice(23, 43), slice(33, 46)), colors[2]),  # the smallest object is drawn last
    ):
        expected = cv2.addWeighted(np.full_like(image, color), 0.4, image, 0.6, 0)
        assert np.array_equal(canvas[place], expected[place])
