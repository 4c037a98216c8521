"""labelme's json files: the pixels of each shape."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mask_rcnn_tools.convert import labelme
from tests.tools.convert.drawn import box, disc, masks_of

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]


def shape(label: str, points: list[list[float]], kind: str = "polygon", **fields: Any) -> Any:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **fields}


def label(path: Path, shapes: list[Any], **fields: Any) -> Path:
    """Writes the json of an image, with labelme's name for it."""
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": path.name, **fields}
    json_file = path.with_suffix(".json")
    json_file.write_text(json.dumps({"imageHeight": 30, "imageWidth": 40, **content}))
    return json_file


def test_each_shape_covers_its_pixels(save: Save, written: Written) -> None:
    small = np.array([[1, 0], [1, 1]], bool)
    file = io.BytesIO()
    Image.fromarray(small).save(file, "PNG")
    pixels = base64.b64encode(file.getvalue()).decode()
    path = save("photos/a.png")
    label(
        path,
        [
            shape("cat", [[2, 3], [12, 3], [12, 8], [2, 8]]),
            shape("dog", [[20, 20], [10, 12]], "rectangle"),
            shape("sun", [[30, 10], [30, 16]], "circle"),
            shape("cat", [[5, 20], [6, 21]], "mask", mask=pixels),
            shape("cat", [[1, 1]], "point"),
            shape("cat", [[1, 1], [9, 9]], "line"),
        ],
    )
    labels = labelme.read(path.parent)
    objects = masks_of(written(labels), "a.png")
    assert [name for name, _ in objects] == ["cat", "dog", "sun", "cat"]
    np.testing.assert_array_equal(objects[0][1], box(30, 40, 2, 3, 12, 8))
    np.testing.assert_array_equal(objects[1][1], box(30, 40, 10, 12, 20, 20))
    assert (objects[2][1] != disc(30, 40, 30, 10, 6, 6)).sum() <= 4
    expected = np.zeros((30, 40), bool)
    expected[20:22, 5:7] = small
    np.testing.assert_array_equal(objects[3][1], expected)
    assert not labels.skipped
    assert sorted(len(places) for places in labels.noted.values()) == [1, 1]


def test_shapes_of_a_group_are_one_object(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    label(
        path,
        [
            shape("cat", [[2, 2], [8, 6]], "rectangle", group_id=1, flags={"hidden": True}),
            shape("cat", [[6, 2], [12, 6]], "rectangle", group_id=1),  # overlaps the first
            shape("dog", [[20, 2], [22, 6]], "rectangle", group_id=1),  # another class
            shape("cat", [[20, 20], [22, 26]], "rectangle"),
            shape("cat", [[30, 20], [32, 26]], "rectangle"),
        ],
        flags={"blurred": True, "night": False},
    )
    coco = written(labelme.read(path.parent))
    objects = masks_of(coco, "a.png")
    assert [name for name, _ in objects] == ["cat", "dog", "cat", "cat"]
    np.testing.assert_array_equal(objects[0][1], box(30, 40, 2, 2, 12, 6))
    assert coco["annotations"][0]["area"] == 40
    assert coco["annotations"][0]["flags"] == ["hidden"]
    assert coco["images"][0]["flags"] == ["blurred"]


def test_a_polygon_beyond_the_image_is_clipped(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    label(
        path,
        [
            shape("cat", [[-10, 25], [5, 25], [5, 50], [-10, 50]]),
            # A U below the image; only its arms reach into the image.
            shape(
                "cat",
                [[10, 20], [14, 20], [14, 40], [20, 40], [20, 20], [24, 20], [24, 50], [10, 50]],
            ),
            shape("cat", [[50, 5], [60, 5], [60, 9]]),
        ],
    )
    labels = labelme.read(path.parent)
    coco = written(labels)
    first, second = masks_of(coco, "a.png")
    np.testing.assert_array_equal(first[1], box(30, 40, 0, 25, 5, 30))
    np.testing.assert_array_equal(
        second[1], box(30, 40, 10, 20, 14, 30) | box(30, 40, 20, 20, 24, 30)
    )
    assert all(isinstance(a["segmentation"], list) for a in coco["annotations"])
    assert sum(map(len, labels.skipped.values())) == 1  # the third is reported


@pytest.mark.parametrize("orientation", range(1, 9))
def test_shapes_refer_to_the_upright_image(orientation: int, save: Save, written: Written) -> None:
    path = save("photos/a.jpg", 40, 30, orientation)
    seen = (40, 30) if orientation < 5 else (30, 40)
    label(
        path,
        [shape("cat", [[2, 3], [12, 8]], "rectangle")],
        imageWidth=seen[0],
        imageHeight=seen[1],
    )
    coco = written(labelme.read(path.parent))
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == seen
    ((_, mask),) = masks_of(coco, "a.jpg")
    np.testing.assert_array_equal(mask, box(seen[1], seen[0], 2, 3, 12, 8))


def test_a_missing_image_is_taken_from_its_json(
    save: Save, written: Written, tmp_path: Path
) -> None:
    path = save("elsewhere/a.png")
    data = path.read_bytes()
    (tmp_path / "photos").mkdir()
    label(
        tmp_path / "photos" / "a.png",
        [shape("cat", [[2, 3], [12, 8]], "rectangle")],
        imagePath="C:\\photos\\a.png",
        imageData=base64.b64encode(data).decode(),
    )
    coco = written(labelme.read(tmp_path / "photos"))
    assert (tmp_path / "out/pets/images/a.png").read_bytes() == data
    np.testing.assert_array_equal(masks_of(coco, "a.png")[0][1], box(30, 40, 2, 3, 12, 8))


def test_no_image_outside_the_given_folders_is_read(
    save: Save, written: Written, tmp_path: Path
) -> None:
    secret = save("secret/a.png")
    (tmp_path / "photos").mkdir()
    label(
        tmp_path / "photos" / "a.png",
        [shape("cat", [[2, 3], [12, 8]], "rectangle")],
        imagePath="../secret/a.png",
    )
    labels = labelme.read(tmp_path / "photos")
    assert not labels.images and sum(map(len, labels.skipped.values())) == 1
    labels = labelme.read(tmp_path / "photos", images=secret.parent)
    assert [image["file_name"] for image in written(labels)["images"]] == ["a.png"]


def test_a_self_intersecting_polygon_keeps_its_pixels(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    # The form of an 8: the areas of its two loops cancel each other.
    eight = [[10, 10], [30, 26], [30, 10], [10, 26]]
    label(path, [shape("cat", eight)])
    coco = written(labelme.read(path.parent))
    ((_, mask),) = masks_of(coco, "a.png")
    y, x = np.mgrid[:30, :40] + 0.5
    expected = (abs(y - 18) < 0.8 * abs(x - 20)) & (abs(x - 20) < 10) & (abs(y - 18) < 8)
    assert (mask != expected).sum() <= 12
    assert isinstance(coco["annotations"][0]["segmentation"], dict)


def test_unreadable_files_are_listed_and_the_rest_is_converted(
    save: Save, written: Written, tmp_path: Path
) -> None:
    path = save("photos/good.png")
    label(path, [shape("cat", [[2, 3], [12, 8]], "rectangle")])
    label(save("photos/empty.png"), [])
    save("photos/unlabelled.png")
    (tmp_path / "photos" / "broken.json").write_text("{")
    (tmp_path / "photos" / "coco.json").write_text('{"images": []}')
    label(tmp_path / "photos" / "missing.png", [])
    label(save("photos/resized.png", 20, 10), [])
    (tmp_path / "photos" / "text.png").write_text("not an image")
    label(tmp_path / "photos" / "text.png", [])
    label(tmp_path / "photos" / "good_copy.png", [], imagePath="good.png")
    label(
        save("photos/odd.png"),
        [
            {"points": []},
            shape(" ", [[1, 1], [5, 5], [9, 1]]),
            shape("cat", [[1, 1], [5, 5]]),
            shape("cat", [[1, float("nan")], [5, 5], [9, 1]]),
            shape("cat", [[1, 1e300], [5, 5], [9, 1]]),
            shape("cat", [[1, 1], [1, 1]], "circle"),
            shape("cat", [[1, 1], [5, 5]], "mask", mask="%%%"),
            shape("cat", [["1", 1], [5, 5], [9, 1]]),
            shape("cat", [[1, 1], [5, 5], [9, 1]], "heart"),
            "cat",
        ],
    )
    labels = labelme.read(tmp_path / "photos")
    skipped = "\n".join(place for places in labels.skipped.values() for place in places)
    for name in ("broken.json", "coco.json", "missing", "resized", "text.png", "good_copy"):
        assert name in skipped
    assert skipped.count("odd.json shapes[") == 10
    assert "unlabelled.png" in str(labels.noted)
    coco = written(labels)
    # Images without objects belong to the data set.
    assert [i["file_name"] for i in coco["images"]] == ["empty.png", "good.png", "odd.png"]
    assert len(coco["annotations"]) == 1
