"""Label Studio's own JSON."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert import label_studio
from mask_rcnn_tools.convert.labels import Labels
from tests.tools.convert.drawn import box, disc, masks_of

Save = Callable[..., Path]
Read = Callable[..., Labels]
Written = Callable[..., dict[str, Any]]

DISC = disc(30, 40, 20, 15, 8, 6)


def region(kind: str, **value: Any) -> dict[str, Any]:
    """A region with the label cat, in an image of 40 x 30 pixels."""
    return {
        "id": f"{kind}-{len(value)}",
        "type": kind,
        "original_width": 40,
        "original_height": 30,
        "image_rotation": 0,
        "value": {kind: ["cat"], **value},
    }


def brush(mask: np.ndarray) -> dict[str, Any]:
    """A brush region: long runs of RGBA values as runs, short ones as single values."""
    values = np.repeat(mask.ravel(), 4).astype(int) * 255
    bits = f"{values.size:032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in (3, 4, 8, 16))
    for value, group in groupby(values.tolist()):
        length = len(list(group))
        if length <= 8:
            bits += "000" + f"{length - 1:03b}" + f"{value:08b}" * length
        else:
            bits += "111" + f"{length - 1:016b}" + f"{value:08b}"
    bits += "0" * (-len(bits) % 8)
    rle = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    return region("brushlabels", format="rle", rle=rle)


RECTANGLE = {"x": 10, "y": 20, "width": 40, "height": 60}  # 4, 6 to 20, 24 in pixels


@pytest.fixture
def read(tmp_path: Path, save: Save) -> Read:
    """Reads one task with the image 0.jpg of 40 x 30 pixels."""

    def read(*results: Any, **task: Any) -> Labels:
        save("photos/0.jpg")
        body = {"id": 1, "data": {"image": "/data/upload/1/0.jpg"}, **task}
        body.setdefault("annotations", [{"id": 1, "result": results, "was_cancelled": False}])
        (tmp_path / "project.json").write_text(json.dumps([body]))
        return label_studio.read(tmp_path / "project.json", images=tmp_path / "photos")

    return read


@pytest.mark.parametrize(
    ("result", "expected", "tolerance"),
    [
        (
            region("polygonlabels", points=[[10, 20], [50, 20], [50, 80], [10, 80]], closed=True),
            box(30, 40, 4, 6, 20, 24),
            0,
        ),
        (region("rectanglelabels", rotation=0, **RECTANGLE), box(30, 40, 4, 6, 20, 24), 0),
        # Turned clockwise around the top left corner: 16 x 18 pixels to the left of x = 30.
        (
            region("rectanglelabels", rotation=90, **{**RECTANGLE, "x": 75}),
            box(30, 40, 12, 6, 30, 22),
            0,
        ),
        (region("ellipselabels", x=50, y=50, radiusX=20, radiusY=20, rotation=0), DISC, 4),
        (region("ellipselabels", x=50, y=50, radiusX=15, radiusY=80 / 3, rotation=90), DISC, 4),
        (brush(DISC), DISC, 0),
        (brush(np.indices((30, 40)).sum(0) % 5 == 0), np.indices((30, 40)).sum(0) % 5 == 0, 0),
    ],
)
def test_shapes(
    result: dict[str, Any], expected: np.ndarray, tolerance: int, read: Read, written: Written
) -> None:
    labels = read(result)
    assert not labels.skipped
    ((name, mask),) = masks_of(written(labels), "0.jpg")
    assert name == "cat" and (mask != expected).sum() <= tolerance


def test_a_label_may_be_a_result_of_its_own(read: Read) -> None:
    shape = {**region("rectangle", **RECTANGLE), "id": "a"}
    del shape["value"]["rectangle"]
    label = {**region("labels", **RECTANGLE), "id": "a"}
    labels = read(shape, label)
    assert not labels.skipped
    assert [labelled.label for labelled in labels.images[0].objects] == ["cat"]


def test_results_without_area_are_noted(read: Read) -> None:
    results = [
        region("keypointlabels", x=1, y=2, width=0.3),
        {"id": "b", "type": "choices", "value": {"choices": ["good"]}},
        {"type": "relation", "from_id": "a", "to_id": "b"},
    ]
    labels = read(*results)
    assert not labels.skipped and labels.images[0].objects == []
    ((_, places),) = [(w, p) for w, p in labels.noted.items() if "area" in w]
    assert len(places) == 3 and "keypointlabels" in places[0]


@pytest.mark.parametrize(
    "result",
    [
        region("polygonlabels", points=[[1, 2], [3, 4]]),
        region("rectanglelabels", x=1, y="2", width=3, height=4),
        region("ellipselabels", x=50, y=50, radiusX=20),
        region("brushlabels", rle="abc"),
        region("brushlabels", rle=[300]),
        region("brushlabels", rle=[]),
        region("brushlabels", rle=[0, 0, 1, 0, 0, 0]),
        region("brushlabels", rle=brush(DISC)["value"]["rle"][:20]),
        region("bitmasklabels", imageDataURL="data:image/png;base64,AAAA"),
        {**region("rectanglelabels", **RECTANGLE), "image_rotation": 90},
        region("polygonlabels", points=[[1, 2], [3, 4], [9, 9]], polygonlabels=["cat", "dog"]),
        region("polygonlabels", points=[[1, 2], [3, 4], [9, 9]], polygonlabels=[" "]),
        {**region("rectanglelabels", **RECTANGLE), "original_width": 80},
    ],
)
def test_invalid_regions_are_skipped_and_named(result: dict[str, Any], read: Read) -> None:
    labels = read(result)
    assert "project.json[0]" in next(iter(labels.skipped.values()))[0]


def annotation(label: str, updated: str, **fields: Any) -> dict[str, Any]:
    shape = region("rectanglelabels", **{**RECTANGLE, "rectanglelabels": [label]})
    return {"result": [shape], "updated_at": updated, **fields}


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ([annotation("new", "2024-02"), annotation("old", "2024-01")], "new"),
        ([annotation("new", "2024-02"), annotation("true", "2024-01", ground_truth=True)], "true"),
        ([annotation("old", "2024-01"), annotation("x", "2024-02", was_cancelled=True)], "old"),
        ([annotation("first", ""), annotation("last", "")], "last"),
    ],
)
def test_one_annotation_of_a_task_is_used(
    annotations: list[Any], expected: str, read: Read
) -> None:
    labels = read(annotations=annotations)
    assert [labelled.label for labelled in labels.images[0].objects] == [expected]
    is_noted = any("several annotations" in what for what in labels.noted)
    assert is_noted == (expected != "old")


def test_tasks_without_annotation_are_left_out(read: Read) -> None:
    labels = read(annotations=[], predictions=[annotation("cat", "")])
    assert labels.images == [] and labels.noted


@pytest.mark.parametrize(
    "name",
    [
        "/data/upload/1/5e6f7a8b-0.jpg",
        "/data/local-files/?d=photos%2F0.jpg",
        "s3://bucket/folder/0.jpg",
        "https://example.com/photos/0.jpg?token=a/b",
        "C:\\photos\\0.jpg",
    ],
)
def test_names_of_images(name: str, read: Read) -> None:
    labels = read(data={"note": "a", "picture": name})
    assert [image.name for image in labels.images] == ["0.jpg"]


def test_a_url_without_its_file_says_what_to_do(read: Read) -> None:
    labels = read(data={"image": "https://example.com/9.jpg"})
    assert "--images" in next(iter(labels.skipped)) and "URL" in next(iter(labels.skipped))
    labels = read(data={"image": "/data/upload/1/9.jpg"})
    assert "--images" in next(iter(labels.skipped)) and "URL" not in next(iter(labels.skipped))


def test_the_files_of_cloud_storage(tmp_path: Path, save: Save) -> None:
    for number, name in enumerate(("1", "2.json")):
        save(f"photos/{number}.jpg")
        task = {"data": {"image": f"gs://bucket/{number}.jpg"}}
        (tmp_path / "photos" / name).write_text(json.dumps({**annotation("cat", ""), "task": task}))
    save("photos/2.jpg")
    labels = label_studio.read(tmp_path / "photos")
    assert [image.name for image in labels.images] == ["0.jpg", "1.jpg"] and not labels.skipped
    ((what, places),) = labels.noted.items()
    assert "without labels" in what and "2.jpg" in places[0]


@pytest.mark.parametrize(
    ("body", "fault"),
    [([{"image": "0.jpg", "label": []}], "'data'"), ({"images": [], "categories": []}, "coco")],
)
def test_other_json_is_refused(body: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=fault):
        label_studio.read(path)
    with pytest.raises(UserError, match=r"list of tasks.*found a\.json"):
        label_studio.read(tmp_path)


def test_an_entry_that_is_not_a_task_is_named(tmp_path: Path, save: Save) -> None:
    save("photos/0.jpg")
    task = {"id": 1, "data": {"image": "0.jpg"}, "annotations": [annotation("cat", "")]}
    path = tmp_path / "photos" / "project.json"
    path.write_text(json.dumps([task, "x", {"data": 3}]))
    labels = label_studio.read(path)
    assert [image.name for image in labels.images] == ["0.jpg"]
    assert [len(places) for places in labels.skipped.values()] == [2]
