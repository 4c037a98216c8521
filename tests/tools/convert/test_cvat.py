"""XML of CVAT, "CVAT for images 1.1"."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert import cvat
from mask_rcnn_tools.convert.labels import Labels
from tests.tools.convert.drawn import box, disc, masks_of

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]

META = """<meta><job><labels>
  <label><name>dog</name><attributes/></label><label><name>cat</name></label>
  <label><name>paw</name><parent>body</parent></label>
</labels></job></meta>"""
CAT = 'label="cat" source="manual" occluded="0" z_order="0"'


@pytest.fixture
def read(tmp_path: Path, save: Save) -> Callable[..., Labels]:
    """Reads an image of 40 x 30 pixels with some shapes, in XML."""

    def read(*shapes: str, image: str = 'name="0.jpg" width="40" height="30"') -> Labels:
        save("task/images/0.jpg")
        text = f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{META}'
        text += f'<image id="0" {image}>{"".join(shapes)}</image></annotations>'
        (tmp_path / "task/annotations.xml").write_text(text, encoding="utf-8")
        return cvat.read(tmp_path / "task")

    return read


Read = Callable[..., Labels]


def brush(mask: np.ndarray, left: int, top: int, width: int, height: int) -> str:
    """A brush mask as CVAT writes it: runs of the pixels in its box, outside first."""
    inside = mask[top : top + height, left : left + width].ravel().tolist()
    runs = [len(list(run)) for _, run in groupby([False, *inside])]
    runs[0] -= 1
    place = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'<mask {CAT} rle="{", ".join(map(str, runs))}" {place}></mask>'


DISC = disc(30, 40, 20, 15, 8, 6)


@pytest.mark.parametrize(
    ("shape", "expected", "tolerance"),
    [
        (f'<polygon {CAT} points="4.0,5.0;20.0,5.0;20,25;4.0,25.0"/>', (4, 5, 20, 25), 0),
        (f'<box {CAT} xtl="4.0" ytl="5.0" xbr="20.0" ybr="25.0"/>', (4, 5, 20, 25), 0),
        # The corners turn around the centre, clockwise.
        (f'<box {CAT} xtl="10" ytl="10" xbr="30" ybr="20" rotation="90"/>', (15, 5, 25, 25), 0),
        (f'<ellipse {CAT} cx="20" cy="15" rx="8" ry="6"/>', DISC, 4),
        (f'<ellipse {CAT} cx="20" cy="15" rx="6" ry="8" rotation="90.0"/>', DISC, 4),
        (brush(DISC, 10, 8, 20, 14), DISC, 0),
        (brush(box(30, 40, 0, 0, 40, 30), 0, 0, 40, 30), (0, 0, 40, 30), 0),
    ],
)
def test_shapes(shape: str, expected: Any, tolerance: int, read: Read, written: Written) -> None:
    labels = read(shape)
    assert not labels.skipped and not labels.noted
    result = written(labels)
    assert [category["name"] for category in result["categories"]] == ["dog", "cat"]
    ((name, mask),) = masks_of(result, "0.jpg")
    expected = box(30, 40, *expected) if isinstance(expected, tuple) else expected
    assert name == "cat" and (mask != expected).sum() <= tolerance


def test_a_turned_box_turns_clockwise(read: Read, written: Written) -> None:
    turned = f'<box {CAT} xtl="10" ytl="13" xbr="30" ybr="17" rotation="45"/>'
    ((_, mask),) = masks_of(written(read(turned)), "0.jpg")
    assert mask[20, 25] and not mask[10, 25]  # from top left to bottom right


def test_a_group_of_one_label_is_one_object(read: Read, written: Written) -> None:
    left, right = box(30, 40, 2, 2, 8, 8), box(30, 40, 20, 20, 30, 28)
    shapes = [
        f'<polygon {CAT} points="2,2;8,2;8,8;2,8" group_id="1"/>',
        brush(right, 20, 20, 10, 8).replace("<mask", '<mask group_id="1"'),
        '<box label="dog" xtl="9" ytl="9" xbr="14" ybr="14" group_id="1"/>',
        f'<box {CAT} xtl="30" ytl="2" xbr="38" ybr="8" group_id="0"/>',
    ]
    objects = masks_of(written(read(*shapes)), "0.jpg")
    assert [name for name, _ in objects] == ["cat", "dog", "cat"]
    assert np.array_equal(objects[0][1], left | right)


def test_shapes_without_area_are_noted(read: Read) -> None:
    points = 'points="1,1;9,9"'
    shapes = [f"<{kind} {CAT} {points}/>" for kind in ("polyline", "points", "cuboid", "tag")]
    shapes.append(f"<skeleton {CAT}><points {CAT} {points}/></skeleton>")
    labels = read(*shapes)
    assert not labels.skipped and labels.images[0].objects == []
    assert [what.split()[4] for what in labels.noted] == [
        "polyline",
        "points",
        "cuboid",
        "tag",
        "skeleton",
    ]


@pytest.mark.parametrize(
    "shape",
    [
        '<box xtl="4.0" ytl="5.0" xbr="20.0" ybr="25.0"/>',
        f'<box {CAT} xtl="nan" ytl="5.0" xbr="20.0" ybr="25.0"/>',
        f'<box {CAT} xtl="1" ytl="5.0" xbr="20.0"/>',
        f'<polygon {CAT} points="4,5;6,7"/>',
        f'<polygon {CAT} points="4,5;6;7,8"/>',
        f"<star {CAT}/>",
        f'<mask {CAT} rle="1, 2" left="0" top="0" width="2" height="2"/>',
        f'<mask {CAT} rle="0, 16" left="38" top="0" width="4" height="4"/>',
        f'<mask {CAT} rle="5, -1" left="0" top="0" width="2" height="2"/>',
        f'<mask {CAT} rle="{10**30}" left="0" top="0" width="{10**15}" height="{10**15}"/>',
    ],
)
def test_invalid_shapes_are_skipped_and_named(shape: str, read: Read) -> None:
    labels = read(shape)
    assert "annotations.xml" in next(iter(labels.skipped.values()))[0]


@pytest.mark.parametrize("image", ['name="9.jpg"', 'name="0.jpg" width="30" height="40"', ""])
def test_invalid_images_are_skipped_and_named(image: str, read: Read) -> None:
    labels = read(image=image)
    assert not labels.images and "annotations.xml" in next(iter(labels.skipped.values()))[0]


def test_subsets_are_splits_if_there_are_several(tmp_path: Path, save: Save) -> None:
    images = ""
    for name, subset in (("a", "Train"), ("b", "Validation")):
        save(f"task/images/{subset}/{name}.jpg")
        images += f'<image name="{name}.jpg" subset="{subset}" width="40" height="30"/>'
    path = tmp_path / "task/annotations.xml"
    path.write_text(f"<annotations>{images}</annotations>")
    assert [image.split for image in cvat.read(path.parent).images] == ["train", "val"]
    path.write_text(f"<annotations>{images.replace('Validation', 'Train')}</annotations>")
    assert [image.split for image in cvat.read(path.parent).images] == ["", ""]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotations>&e;</annotations>',
            "DTD",
        ),
        ("<annotations><image>", "not valid XML"),
        ("<annotations><track/></annotations>", "CVAT for images 1.1"),
        ("<annotation><filename>a.jpg</filename></annotation>", "CVAT for images 1.1"),
        ("<annotations>" + "<a>" * 100_000, "not valid XML"),
    ],
)
def test_other_xml_is_refused(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        cvat.read(path)
    with pytest.raises(UserError, match=r"annotations\.xml.*found a\.xml"):
        cvat.read(tmp_path)
