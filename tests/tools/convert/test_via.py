"""VIA's projects and exports: the pixels of each region."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.convert import via
from tests.tools.convert.drawn import box, disc, masks_of

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]

REGIONS = [
    ({"name": "rect", "x": 10, "y": 12, "width": 10, "height": 8}, {"kind": "dog"}),
    (
        {"name": "polygon", "all_points_x": [2, 12, 12, 2], "all_points_y": [3, 3, 8, 8]},
        {"kind": "cat"},
    ),
    ({"name": "circle", "cx": 30, "cy": 10, "r": 6}, {"kind": "cat"}),
    # Rotated by 90 degrees: the long half axis points down.
    (
        {"name": "ellipse", "cx": 30, "cy": 20, "rx": 8, "ry": 4, "theta": 1.5707963267948966},
        {"kind": "cat"},
    ),
    ({"name": "point", "cx": 1, "cy": 1}, {"kind": "cat"}),
    ({"name": "polyline", "all_points_x": [1, 5], "all_points_y": [1, 5]}, {"kind": "cat"}),
]


def metadata(path: Path, regions: Any = REGIONS) -> dict[str, Any]:
    size = path.stat().st_size
    return {
        f"{path.name}{size}": {
            "filename": path.name,
            "size": size,
            "regions": [{"shape_attributes": s, "region_attributes": a} for s, a in regions],
            "file_attributes": {},
        }
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_csv(path: Path, image: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("filename", "file_size", "file_attributes", "region_count", "region_id"),
                *("region_shape_attributes", "region_attributes"),
            ]
        )
        for number, (shape, attributes) in enumerate(REGIONS):
            counts = [image.stat().st_size, "{}", len(REGIONS), number]
            writer.writerow([image.name, *counts, json.dumps(shape), json.dumps(attributes)])
        writer.writerow(["empty.png", 5, "{}", 0, 0, "{}", "{}"])
    return path


@pytest.mark.parametrize("form", ["project", "export", "numbered", "csv"])
def test_each_region_covers_its_pixels(
    form: str, save: Save, written: Written, tmp_path: Path
) -> None:
    image, empty = save("photos/a.png"), save("photos/empty.png")
    entries = {**metadata(image), **metadata(empty, [])}
    if form == "csv":
        source = write_csv(tmp_path / "via.csv", image)
    else:
        if form == "numbered":  # as in VIA 1
            for entry in entries.values():
                entry["regions"] = {str(i): r for i, r in enumerate(entry["regions"])}
        content = (
            entries if form != "project" else {"_via_img_metadata": entries, "_via_settings": {}}
        )
        source = write(tmp_path / "via.json", content)
    labels = via.read(source, images=image.parent)
    coco = written(labels)
    assert [i["file_name"] for i in coco["images"]] == ["a.png", "empty.png"]
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog"]
    objects = masks_of(coco, "a.png")
    assert [name for name, _ in objects] == ["dog", "cat", "cat", "cat"]
    np.testing.assert_array_equal(objects[0][1], box(30, 40, 10, 12, 20, 20))
    np.testing.assert_array_equal(objects[1][1], box(30, 40, 2, 3, 12, 8))
    assert (objects[2][1] != disc(30, 40, 30, 10, 6, 6)).sum() <= 4
    assert (objects[3][1] != disc(30, 40, 30, 20, 4, 8)).sum() <= 4
    assert not labels.skipped and len(labels.noted) == 2  # the point and the polyline


def test_the_class_comes_from_the_chosen_attribute(
    save: Save, written: Written, tmp_path: Path
) -> None:
    image = save("photos/a.png")
    rect = {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5}
    regions = [
        (rect, {"species": {"cat": True, "dog": False}, "age": "3"}),  # a checkbox
        (rect, {"species": "dog", "age": "4"}),
        (rect, {"species": {"cat": True, "dog": True}, "age": "5"}),
        (rect, {"age": "5"}),
    ]
    source = write(image.with_name("via.json"), metadata(image, regions))
    with pytest.raises(UserError, match=r"--class-attribute: .*'age' \(4 regions\), 'species' \(3"):
        via.read(source)
    with pytest.raises(UserError, match="did you mean 'species'"):
        via.read(source, class_attribute="specie")
    labels = via.read(source, class_attribute="species")
    assert [labelled.label for labelled in labels.images[0].objects] == ["cat", "dog"]
    assert sum(map(len, labels.skipped.values())) == 2


def test_regions_without_attributes_get_the_given_class(save: Save, written: Written) -> None:
    image = save("photos/a.png")
    rect = {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5}
    source = write(image.with_name("via_region_data.json"), metadata(image, [(rect, {})]))
    with pytest.raises(UserError, match="--class-name"):
        via.read(source)
    (category,) = written(via.read(source, class_name="balloon"))["categories"]
    assert category == {"id": 1, "name": "balloon"}


def test_unreadable_files_and_regions_are_listed(save: Save, tmp_path: Path) -> None:
    image = save("photos/a.png")
    regions = [
        ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}, {"kind": "cat"}),
        ({"name": "circle", "cx": 1, "cy": 1, "r": -4}, {"kind": "cat"}),
        ({"name": "rect", "x": 1, "y": None, "width": 5, "height": 5}, {"kind": "cat"}),
        ({}, {"kind": "cat"}),
        (None, None),
    ]
    entries = metadata(image, regions)
    entries["gone"] = {"filename": "gone.png", "regions": []}
    entries["again"] = {"filename": "a.png", "regions": []}
    write(image.with_name("via.json"), entries)
    image.with_name("bad.json").write_text("[1]")
    image.with_name("bad.csv").write_text("a,b\n1,2\n")
    labels = via.read(image.parent, class_attribute="kind")
    skipped = [place for places in labels.skipped.values() for place in places]
    assert len(skipped) == 5 + 4
    for text in ("gone.png", "bad.json", "bad.csv", "all_points_x", "radius -4"):
        assert any(text in place for place in skipped)
