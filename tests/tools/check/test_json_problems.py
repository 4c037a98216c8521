"""Problems of a json, one json per kind: the kind, the entry, and what the repair keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus.data.coco_json import read_coco_json
from mask_rcnn_tools.check.checking import repair_coco
from mask_rcnn_tools.check.json_checks import inspect
from mask_rcnn_tools.check.problems import ERROR, KINDS
from mask_rcnn_tools.check.result import CheckResult

Check = Callable[..., CheckResult]
NAN, INF = float("nan"), float("inf")


def at(path: str, value: Any) -> Callable[[Any], None]:
    """Sets a value of a content, such as "annotations.0.bbox"; removes it for Ellipsis."""

    def change(content: Any) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            content = content[key]
        if value is ...:
            del content[last]
        elif last == "+":
            content.append(value)
        else:
            content[last] = value

    return change


def both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for change_one in changes:
            change_one(content)

    return change


def in_all(field: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def every(content: Any) -> None:
        for annotation in content["annotations"]:
            if (value := change(annotation)) is ...:
                del annotation[field]
            else:
                annotation[field] = value

    return every


def mask(value: Any) -> Callable[[Any], None]:
    return at("annotations.0.segmentation", value)


def box(*values: Any) -> Callable[[Any], None]:
    return at("annotations.0.bbox", list(values))


def text_ids(content: Any) -> None:
    for section in ("images", "categories", "annotations"):
        for entry in content[section]:
            for field in ("id", "image_id", "category_id"):
                if field in entry:
                    entry[field] = f"n{entry[field]}"


def fractions(annotation: Any) -> list[float]:
    width, height = (50, 40) if annotation["image_id"] == 5 else (20, 30)
    x, y, w, h = annotation["bbox"]
    return [x / width, y / height, w / width, h / height]


SQUARE = [2, 3, 22, 3, 22, 13, 2, 13]
BARE = in_all("segmentation", lambda _: ...)
CORNERS = in_all("bbox", lambda a: [30, 20, 45, 35] if a["image_id"] == 5 else [12, 10, 18, 28])

# (what is damaged, the kinds found with the positions of their entries, the annotations that stay)
ALL, LAST_TWO = [1, 2, 3], [2, 3]
CASES: list[tuple[str, Callable[[Any], None], dict[str, list[int]], list[int]]] = [
    ("nothing", lambda _: None, {}, ALL),
    ("entry", at("annotations.0", 7), {"entry": [0]}, LAST_TWO),
    ("image entry", at("images.1", []), {"entry": [1], "unknown-image": [2]}, [1, 2]),
    ("id missing", at("annotations.0.id", ...), {"id-missing": [0]}, [2, 3, 4]),
    ("id text", at("annotations.0.id", "1"), {"id-type": [0]}, ALL),
    ("id fraction", at("annotations.0.id", 1.5), {"id-type": [0]}, [2, 3, 4]),
    ("id true", at("annotations.0.id", True), {"id-type": [0]}, [2, 3, 4]),
    ("id list", at("annotations.0.id", [1]), {"id-type": [0]}, [2, 3, 4]),
    ("id twice", at("annotations.0.id", 2), {"id-duplicate": [1]}, [2, 3, 3]),
    ("id zero", at("annotations.0.id", 0), {"id-zero": [0]}, [2, 3, 4]),
    ("all text", text_ids, {"id-type": [0, 1, 0, 1, 0, 1, 2], "category-gap": []}, ALL),
    ("image id twice", at("images.1.id", 5), {"id-duplicate": [1], "unknown-image": [2]}, [1, 2]),
    ("image unknown", at("annotations.0.image_id", 9), {"unknown-image": [0]}, LAST_TWO),
    ("image as text", at("annotations.0.image_id", "5"), {"unknown-image": [0]}, ALL),
    ("no category", at("annotations.2.category_id", ...), {"unknown-category": [2]}, [1, 2]),
    ("category", at("annotations.2.category_id", {}), {"unknown-category": [2]}, [1, 2]),
    ("category id twice", at("categories.+", {"id": 2, "name": "owl"}), {"id-duplicate": [2]}, ALL),
    ("category name", at("categories.0.name", ...), {"category-name": [0]}, ALL),
    ("category twin", at("categories.0.name", "dog"), {"category-twin": [1]}, ALL),
    ("gap", both(at("categories.0.id", 7), at("annotations.0.category_id", 7)),
     {"category-gap": [1]}, ALL),
    ("unused", at("categories.+", {"id": 3, "name": "owl"}), {"category-unused": [2]}, ALL),
    ("no mask", mask(...), {"mask-missing": [0]}, LAST_TWO),
    ("null mask", mask(None), {"mask-missing": [0]}, LAST_TWO),
    ("empty mask", mask([]), {"mask-missing": [0]}, LAST_TWO),
    ("no masks", BARE, {"no-masks": [0]}, ALL),
    ("text mask", mask("x"), {"mask-type": [0]}, LAST_TWO),
    ("flat mask", mask(SQUARE), {"mask-flat": [0]}, ALL),
    ("text polygon", mask([SQUARE, ["1"] * 6]), {"polygon-type": [0]}, ALL),
    ("nested polygon", mask([[[2, 3], [22, 3]]]), {"polygon-type": [0]}, LAST_TWO),
    ("short", mask([[1, 2, 3, 4]]), {"polygon-short": [0]}, LAST_TWO),
    ("empty polygon", mask([[], SQUARE]), {"polygon-short": [0]}, ALL),
    ("odd", mask([[*SQUARE, 5]]), {"polygon-odd": [0]}, LAST_TWO),
    ("nan", mask([[*SQUARE[:-1], NAN]]), {"polygon-nan": [0]}, LAST_TWO),
    ("inf", mask([[*SQUARE[:-1], -INF], SQUARE]), {"polygon-nan": [0]}, ALL),
    ("huge", mask([[*SQUARE[:-1], 10**400]]), {"polygon-nan": [0]}, LAST_TWO),
    ("absurd", mask([[*SQUARE[:-1], 1e8]]), {"polygon-absurd": [0]}, LAST_TWO),
    ("long", mask([[0, 0, 1400, 1400] * 20000]), {"polygon-absurd": [0]}, LAST_TWO),
    ("line", mask([[2, 3, 22, 13, 2, 3]]), {"polygon-flat": [0], "mask-empty": [0]}, LAST_TWO),
    ("outside", mask([[60, 3, 80, 3, 80, 13, 60, 13]]), {"mask-outside": [0]}, LAST_TWO),
    ("over edge", both(mask([[2, 3, 60, 3, 60, 13, 2, 13]]), box(2, 3, 58, 10)),
     {"mask-over-edge": [0], "box-over-edge": [0]}, ALL),
    ("rle size", mask({"size": [50, 40], "counts": [0, 2000]}), {"rle-size": [0]}, LAST_TWO),
    ("rle no size", mask({"counts": [0, 2000]}), {"rle-size": [0]}, LAST_TWO),
    ("rle float size", mask({"size": [40.0, 50], "counts": "PPYo1"}), {"rle-size": [0]}, LAST_TWO),
    ("rle sum", mask({"size": [40, 50], "counts": [0, 1999]}), {"rle-counts": [0]}, LAST_TWO),
    ("rle list", mask({"size": [40, 50], "counts": [2500, -500]}), {"rle-counts": [0]}, LAST_TWO),
    ("rle text", mask({"size": [40, 50], "counts": "~~"}), {"rle-counts": [0]}, LAST_TWO),
    ("rle void", mask({"size": [40, 50], "counts": ""}), {"rle-counts": [0]}, LAST_TWO),
    ("rle cut", mask({"size": [40, 50], "counts": "l"}), {"rle-counts": [0]}, LAST_TWO),
    ("rle none", mask({"size": [40, 50], "counts": None}), {"rle-counts": [0]}, LAST_TWO),
    ("rle empty", mask({"size": [40, 50], "counts": [2000]}), {"mask-empty": [0]}, LAST_TWO),
    ("3 numbers", box(2, 3, 20), {"box-type": [0]}, ALL),
    ("text box", box("2", 3, 20, 10), {"box-type": [0]}, ALL),
    ("no box", at("annotations.0.bbox", ...), {"box-type": [0]}, ALL),
    ("no box nor mask", both(BARE, at("annotations.0.bbox", ...)),
     {"box-type": [0], "no-masks": [0]}, LAST_TWO),
    ("nan box", box(2, 3, NAN, 10), {"box-nan": [0]}, ALL),
    ("huge box", box(2, 3, 10**400, 10), {"box-nan": [0]}, ALL),
    ("negative", box(22, 3, -20, 10), {"box-negative": [0]}, ALL),
    ("zero", box(2, 3, 0, 10), {"box-empty": [0]}, ALL),
    ("xyxy", box(2, 3, 22, 13), {"box-xyxy": [0]}, ALL),
    ("xyxy without", both(BARE, CORNERS), {"box-xyxy": [0, 1, 2], "no-masks": [0]}, ALL),
    ("fractions", in_all("bbox", fractions), {"box-normalised": [0, 1, 2]}, ALL),
    ("fractions bare", both(BARE, in_all("bbox", fractions)),
     {"box-normalised": [0, 1, 2], "no-masks": [0]}, ALL),
    ("fractions, no size", both(box(0.1, 0.1, 0.5, 0.5), at("images.0.width", None)),
     {"box-mask": [0], "image-field": [0]}, ALL),
    ("box outside", box(70, 3, 20, 10), {"box-outside": [0]}, ALL),
    ("other box", box(2, 3, 10, 10), {"box-mask": [0]}, ALL),
    ("crowd 2", at("annotations.0.iscrowd", 2), {"crowd-flag": [0]}, ALL),
    ("crowd text", at("annotations.0.iscrowd", "0"), {"crowd-flag": [0]}, ALL),
    ("no crowd", at("annotations.0.iscrowd", ...), {"crowd-missing": [0]}, ALL),
    ("crowd of polygons", at("annotations.0.iscrowd", 1), {"crowd-polygons": [0]}, ALL),
    ("crowd only", at("annotations.2.iscrowd", 1), {"crowd-polygons": [2], "crowd-only": [1]}, ALL),
    ("ignore", at("annotations.0.ignore", 1), {"ignore": [0]}, ALL),
    ("no area", at("annotations.0.area", ...), {"area-missing": [0]}, ALL),
    ("nan area", at("annotations.0.area", NAN), {"area": [0]}, ALL),
    ("minus area", at("annotations.0.area", -1), {"area": [0]}, ALL),
    ("keypoints", at("annotations.0.keypoints", [1, 2]), {"keypoints": [0]}, ALL),
    ("text keypoints", at("annotations.0.keypoints", "x"), {"keypoints": [0]}, ALL),
    ("no images", both(at("images", []), at("annotations", [])),
     {"no-images": [-1], "category-unused": [0, 1]}, []),
    ("no file name", at("images.1.file_name", ...), {"image-field": [1]}, [1, 2]),
    ("text height", at("images.1.height", "30"), {"image-field": [1]}, ALL),
    ("no width", at("images.1.width", ...), {"image-field": [1]}, ALL),
    ("minus width", at("images.1.width", -20), {"image-field": [1]}, ALL),
    ("huge height", both(at("images.1.height", 10**400), at("annotations.2.bbox", None)),
     {"image-field": [1], "box-type": [2]}, ALL),
    ("many pixels", at("images.1.width", 10**9), {"image-field": [1]}, ALL),
    ("no annotation", at("annotations.2", ...), {"image-empty": [1]}, [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kinds", "stay"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_each_kind_of_problem_is_found_and_repaired(
    check: Check,
    valid: dict[str, Any],
    tmp_path: Path,
    change: Callable[[Any], None],
    kinds: dict[str, list[int]],
    stay: list[int],
) -> None:
    change(valid)
    result = check(valid)
    expected = {kind: at for kind, at in kinds.items() if at}
    found: dict[str, list[int]] = {}
    for problem in result.problems:
        found.setdefault(problem.kind, []).append(problem.position)
    # Some of the changes leave an image or a class without annotations.
    for kind in {"image-empty", "category-unused", "rle"} - kinds.keys():
        found.pop(kind, None)
    assert found == expected

    repaired = repair_coco(result)
    assert repaired.left == [p for p in repaired.left if p.kind == "no-images"]
    ids = [annotation["id"] for annotation in repaired.content["annotations"]]
    assert sorted(ids) == sorted(set(ids)) and len(ids) == len(stay)
    if "all text" not in kinds and "id-duplicate" not in kinds:
        assert sorted(ids) == stay
    # The strict reader and a second check accept the repaired json.
    again = [p for p in inspect(repaired.content).problems if p.kind != "no-images"]
    assert not [problem for problem in again if KINDS[problem.kind].severity == ERROR]
    path = tmp_path / "repaired.json"
    path.write_text(repaired.text())
    if repaired.content["images"]:
        read_coco_json(path)
    if not expected:
        assert json.loads(path.read_text()) == valid


def test_a_duplicate_is_found(check: Check, valid: dict[str, Any]) -> None:
    valid["annotations"].append({**valid["annotations"][1], "id": 9})
    valid["annotations"].append({**valid["annotations"][1], "id": 10, "bbox": [30, 20, 10, 10]})
    result = check(valid)
    assert [(p.kind, p.id) for p in result.problems] == [("twin", 9)]
    assert [a["id"] for a in repair_coco(result).content["annotations"]] == [1, 2, 3, 10]


def test_an_annotation_without_a_valid_polygon_is_removed(
    check: Check, valid: dict[str, Any]
) -> None:
    valid["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    assert repair_coco(check(valid)).changes == {"polygon-short": 1}


def test_repaired_values(check: Check, valid: dict[str, Any]) -> None:
    annotations = valid["annotations"]
    annotations[0].update(bbox=[2, 3, NAN, 1], area=-1)
    annotations[1].update(bbox=[30.5, 20, 40.5, 30])
    annotations[2].update(bbox=fractions(annotations[2]), iscrowd="0", image_id="6")
    valid["images"][1]["width"] = "20"
    first, second, third = repair_coco(check(valid)).content["annotations"]
    assert first["bbox"] == [2, 3, 20, 10] and first["area"] == 200
    assert second["bbox"] == [30.5, 20, 10, 10]
    assert third["bbox"] == pytest.approx([1, 2, 10, 20])
    assert third["iscrowd"] == 0 and third["image_id"] == 6


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("", "no-json"),
        ('{"images": [', "no-json"),
        ("[" * 100_000, "no-json"),
        ("\x00\x01", "no-json"),
        ('{"images": ' + "9" * 5000 + "}", "no-json"),
        ("[]", "no-coco"),
        ('{"a.png": {"regions": []}}', "no-coco"),
        ('{"images": [], "annotations": {}, "categories": []}', "no-coco"),
        ('{"images": [], "annotations": [], "categories": []}', "no-coco"),
    ],
)
def test_other_content_is_not_coco(check: Check, content: str, kind: str) -> None:
    result = check(content)
    assert [problem.kind for problem in result.problems] == [kind]
    assert not result.is_coco()
    assert "\n\n" in result.text()


def test_repairing_a_text_id_keeps_references_to_the_number(
    check: Check, valid: dict[str, Any]
) -> None:
    valid["images"][0]["id"] = str(valid["images"][0]["id"])
    valid["categories"][1]["id"] = "2"
    content = repair_coco(check(valid)).content
    assert [image["id"] for image in content["images"]] == [5, 6]
    assert [(a["image_id"], a["category_id"]) for a in content["annotations"]] == [
        (5, 1),
        (5, 2),
        (6, 2),
    ]


def test_ids_beyond_64_bits_get_new_numbers(check: Check, valid: dict[str, Any]) -> None:
    valid["annotations"][0]["id"] = 10**400
    valid["images"][1]["id"] = valid["annotations"][2]["image_id"] = 2**64
    result = check(valid)
    found = [(problem.kind, problem.section, problem.position) for problem in result.problems]
    assert found == [("id-type", "images", 1), ("id-type", "annotations", 0)]
    content = repair_coco(result).content
    assert [image["id"] for image in content["images"]] == [5, 6]
    assert [a["image_id"] for a in content["annotations"]] == [5, 5, 6]
    assert sorted(a["id"] for a in content["annotations"]) == [2, 3, 4]
