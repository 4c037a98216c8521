"""The images of the generated shapes, and their annotations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask_rcnn_plus.data import (
    class_names,
    generate_shapes,
    register_folder_datasets,
    require_dataset,
)

CENTRE, TOP, TOP_LEFT, TOP_RIGHT, BOTTOM_RIGHT, BOTTOM_LEFT = range(6)


class Drawn:
    """A generated split, with each image's pixels and each annotation's mask as bool."""

    def __init__(self, root: Path, split: str) -> None:
        self.path = root / "shapes" / f"{split}.json"
        self.coco = COCO(str(self.path))
        self.images = {
            image["id"]: cv2.imread(str(root / "shapes" / "images" / image["file_name"]))
            for image in self.coco.dataset["images"]
        }
        self.annotations = self.coco.dataset["annotations"]
        self.masks = {a["id"]: self.coco.annToMask(a).astype(bool) for a in self.annotations}

    def by_image(self) -> Iterator[list[dict[str, Any]]]:
        return (self.coco.imgToAnns[image] for image in self.images)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [a for a in self.annotations if self.coco.cats[a["category_id"]]["name"] == kind]

    def points(self, annotation: dict[str, Any]) -> np.ndarray:
        """(6, 3): x, y with (0, 0) at the image's corner, and the visibility."""
        from_centres = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
        return from_centres + np.array([0.5, 0.5, 0])


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images with both kinds of masks."""
    result = {}
    for mask_format in ("polygon", "rle"):
        result[mask_format] = tmp_path_factory.mktemp(mask_format)
        names = generate_shapes(
            result[mask_format], num_train=60, num_val=5, mask_format=mask_format, progress=False
        )
        assert names == ["shapes_train", "shapes_val"]
    return result


@pytest.fixture(scope="module")
def drawn(roots: dict[str, Path]) -> Drawn:
    return Drawn(roots["polygon"], "train")


# The images.


def test_files_and_sizes(roots: dict[str, Path], drawn: Drawn) -> None:
    assert len(list((roots["polygon"] / "shapes" / "images").iterdir())) == 65
    assert len(drawn.images) == 60
    assert {image.shape for image in drawn.images.values()} == {(192, 192, 3)}
    entries = drawn.coco.dataset["images"]
    assert {(e["height"], e["width"]) for e in entries} == {(192, 192)}


def test_every_image_has_objects_and_every_class_its_share(drawn: Drawn) -> None:
    counts = [len(annotations) for annotations in drawn.by_image()]
    assert min(counts) >= 1
    assert max(counts) == 8
    assert 3.5 < np.mean(counts) < 6
    for kind in ("circle", "square", "triangle"):
        assert len(drawn.of_kind(kind)) > 0.2 * len(drawn.annotations)


def test_boxes_and_areas_match_the_masks(drawn: Drawn) -> None:
    for annotation in drawn.annotations:
        mask = drawn.masks[annotation["id"]]
        rows, columns = np.nonzero(mask)
        tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation["bbox"] == tight
        assert {type(value) for value in annotation["bbox"]} == {float}  # whole numbers truncate
        assert annotation["area"] == mask.sum() >= 50
        assert annotation["iscrowd"] == 0


def test_visible_parts_do_not_overlap(drawn: Drawn) -> None:
    for annotations in drawn.by_image():
        assert sum(drawn.masks[a["id"]].astype(int) for a in annotations).max() == 1


def test_shapes_cover_each_other_but_not_too_much(drawn: Drawn) -> None:
    covered = 0
    for kind, of_square in (("square", 1.0), ("circle", np.pi / 4)):
        for annotation in drawn.of_kind(kind):
            points = drawn.points(annotation)
            if kind == "square":
                side = np.linalg.norm(points[TOP_LEFT, :2] - points[TOP_RIGHT, :2])
            else:
                side = max(annotation["bbox"][2:])
            fraction = annotation["area"] / (of_square * side**2)
            assert fraction > 0.48
            covered += fraction < 0.9
    assert covered > 0.15 * len(drawn.annotations)


def test_sizes_range_from_12_pixels_to_a_good_part_of_the_image(drawn: Drawn) -> None:
    """A shape's size: the square's side, the triangle's height, the circle's diameter."""
    sizes = [
        np.linalg.norm(np.subtract(*drawn.points(a)[[first, second], :2])) * factor
        for kind, first, second, factor in (
            ("square", TOP_LEFT, TOP_RIGHT, 1),
            ("triangle", BOTTOM_LEFT, BOTTOM_RIGHT, np.sqrt(3) / 2),
        )
        for a in drawn.of_kind(kind)
    ]
    assert 11.98 <= min(sizes) <= 13
    assert 70 < max(sizes) < 85
    assert 11 <= min(max(a["bbox"][2:]) for a in drawn.of_kind("circle")) <= 15


def test_pixels_change_at_the_edge_of_the_mask(drawn: Drawn) -> None:
    """The outlines of the masks are on edges of the image: any shift moves them off the edges."""
    steps: dict[tuple[int, int], list[float]] = {}
    for annotation in drawn.annotations:
        image = drawn.images[annotation["image_id"]].astype(float)
        mask = np.pad(drawn.masks[annotation["id"]], 2)
        for shift in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)):
            moved = np.roll(mask, shift, axis=(0, 1))[2:-2, 2:-2]
            right = moved[:, 1:-2] & ~moved[:, 2:-1]  # the last column inside
            # From one pixel inside to one outside, across the anti-aliased one.
            change = np.abs(image[:, :-3] - image[:, 3:]).sum(axis=2)
            steps.setdefault(shift, []).append(change[right].mean() if right.any() else 0)
    on_edge, *beside = (np.mean(values) for values in steps.values())
    # Vertical shifts do not move vertical sides, so they change less.
    assert on_edge > 1.15 * max(beside)
    assert on_edge > 1.3 * max(beside[2:])


def test_masks_match_the_geometry(drawn: Drawn) -> None:
    """Squares and triangles that nothing covers are the polygons between their corners."""
    checked = 0
    for kind, corners in (
        ("square", [TOP_LEFT, TOP_RIGHT, BOTTOM_RIGHT, BOTTOM_LEFT]),
        ("triangle", [TOP, BOTTOM_RIGHT, BOTTOM_LEFT]),
    ):
        whole = [a for a in drawn.of_kind(kind) if 1 not in a["keypoints"][2::3]]
        for annotation in whole[:25]:
            outline = drawn.points(annotation)[corners, :2].astype(np.float32)
            left, top, width, height = (int(value) for value in annotation["bbox"])
            inside = np.zeros((192, 192), dtype=bool)
            for y in range(top - 1, top + height + 1):
                for x in range(left - 1, left + width + 1):
                    if cv2.pointPolygonTest(outline, (x + 0.5, y + 0.5), False) >= 0:
                        inside[y, x] = True
            mask = drawn.masks[annotation["id"]]
            # Keypoints are rounded to a hundredth of a pixel, which may change a pixel.
            assert (mask & ~inside).sum() <= 1
            # A side may be covered although no corner is.
            checked += (mask ^ inside).sum() <= 1
    assert checked > 30


def test_keypoints_belong_to_their_kind(drawn: Drawn) -> None:
    expected = {
        "circle": [CENTRE],
        "square": [CENTRE, TOP_LEFT, TOP_RIGHT, BOTTOM_RIGHT, BOTTOM_LEFT],
        "triangle": [CENTRE, TOP, BOTTOM_RIGHT, BOTTOM_LEFT],
    }
    for kind, labelled in expected.items():
        for annotation in drawn.of_kind(kind):
            points = drawn.points(annotation)
            assert np.flatnonzero(points[:, 2]).tolist() == labelled
            assert annotation["num_keypoints"] == len(labelled)
            assert (points[labelled, :2] >= 0).all()
            assert (points[labelled, :2] <= 192).all()
            x, y = points[:, 0], points[:, 1]
            if kind == "square":
                assert x[[TOP_LEFT, BOTTOM_LEFT]].max() < x[[TOP_RIGHT, BOTTOM_RIGHT]].min()
                assert y[[TOP_LEFT, TOP_RIGHT]].max() < y[[BOTTOM_LEFT, BOTTOM_RIGHT]].min()
            if kind == "triangle":
                assert x[BOTTOM_LEFT] < x[TOP] + 1e-6 and x[TOP] < x[BOTTOM_RIGHT] + 1e-6
                assert y[TOP] < y[[BOTTOM_LEFT, BOTTOM_RIGHT]].min()


def test_visibility_tells_covered_points(drawn: Drawn) -> None:
    """A visible point touches its own mask, a covered one that of an object drawn later."""
    visible, covered = [], []
    for annotations in drawn.by_image():
        for annotation in annotations:
            for x, y, visibility in drawn.points(annotation):
                rows = slice(max(0, int(y) - 2), int(y) + 3)
                columns = slice(max(0, int(x) - 2), int(x) + 3)
                near = [a["id"] for a in annotations if drawn.masks[a["id"]][rows, columns].any()]
                if visibility == 2:
                    visible.append(annotation["id"] in near)
                elif visibility == 1:
                    covered.append(any(other > annotation["id"] for other in near))
    assert len(covered) > 20
    assert all(covered)
    # A sharp corner can be visible while all pixels around it belong to the next shape.
    assert np.mean(visible) > 0.99


def test_visible_centres_are_in_the_mask(drawn: Drawn) -> None:
    agree = []
    for annotation in drawn.annotations:
        x, y, visibility = drawn.points(annotation)[CENTRE]
        agree.append(drawn.masks[annotation["id"]][int(y), int(x)] == (visibility == 2))
    # A point in a pixel on an outline may belong to the other side than the pixel.
    assert np.mean(agree) > 0.97


@pytest.mark.parametrize("size", [(32, 32), (33, 300), (400, 40)])
def test_other_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    generate_shapes(tmp_path, num_train=10, num_val=1, image_size=size, progress=False)
    drawn = Drawn(tmp_path, "train")
    for image, annotations in zip(drawn.images.values(), drawn.by_image(), strict=True):
        assert image.shape == (*size, 3)
        assert annotations
        assert all(drawn.masks[a["id"]].shape == size for a in annotations)


# The json.


def test_polygons_and_run_lengths_are_the_same_masks(roots: dict[str, Path], drawn: Drawn) -> None:
    other = Drawn(roots["rle"], "train")
    assert len(other.annotations) == len(drawn.annotations)
    parts = set()
    for polygon, rle in zip(drawn.annotations, other.annotations, strict=True):
        parts.add(len(polygon["segmentation"]))
        assert isinstance(rle["segmentation"]["counts"], str)
        decoded = mask_util.decode(rle["segmentation"]).astype(bool)
        assert np.array_equal(drawn.masks[polygon["id"]], decoded)
        same = [{k: v for k, v in a.items() if k != "segmentation"} for a in (polygon, rle)]
        assert same[0] == same[1]
    assert parts > {1}
    assert [i.tobytes() for i in drawn.images.values()] == [
        i.tobytes() for i in other.images.values()
    ]


def test_the_ground_truth_scores_an_ap_of_100(drawn: Drawn) -> None:
    results = [{**a, "score": 1.0} for a in drawn.annotations]
    detected = COCO()
    detected.dataset = {**drawn.coco.dataset, "annotations": results}
    detected.createIndex()
    for task in ("bbox", "segm", "keypoints"):
        evaluation = COCOeval(drawn.coco, detected, task)
        evaluation.params.kpt_oks_sigmas = np.full(6, 0.05)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


def test_detectron2_loads_both_formats(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in roots.values():
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        assert {"shapes_train", "shapes_val"} <= set(register_folder_datasets())
        assert class_names("shapes_train") == ["circle", "square", "triangle"]
        assert len(require_dataset("shapes_train", training=True)) == 60
        # Left and right swap in a mirrored image, the others stay.
        flips = create_keypoint_hflip_indices("shapes_train")
        assert flips == [CENTRE, TOP, TOP_RIGHT, TOP_LEFT, BOTTOM_LEFT, BOTTOM_RIGHT]
        for name in ("shapes_train", "shapes_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
