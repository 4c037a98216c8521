"""The command mask-rcnn-plus check-data."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mask_rcnn_plus.data import register_folder_datasets
from mask_rcnn_tools.cli import main

ROOT = Path(__file__).parents[3]

Make = Callable[..., Path]


def content() -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "bbox": [2, 3, 10, number + 5],
                "area": 10.0 * (number + 5),
                "iscrowd": 0,
                "segmentation": [[2, 3, 12, 3, 12, number + 8, 2, number + 8]],
            }
            for number in range(1, 9)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes the data set pets_train, damaged by a function; returns its json."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("MASK_RCNN_PLUS_CACHE", str(tmp_path / ".cache"))

    def make(
        damage: Callable[[dict[str, Any]], Any] = lambda _: None, split: str = "train"
    ) -> Path:
        images = tmp_path / "pets" / "images"
        images.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3))
        cv2.imwrite(str(images / "a.png"), pixels)
        coco = content()
        damaged = damage(coco)
        path = tmp_path / "pets" / f"{split}.json"
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(coco))
        register_folder_datasets()
        return path

    return make


def damage_masks(coco: dict[str, Any]) -> None:
    for annotation in coco["annotations"][:7]:
        annotation["segmentation"] = {"size": [9, 9], "counts": [81]}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["check-data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_a_valid_data_set(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    assert main(["check-data", "pets_train"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("pets_train: 1 image, 8 annotations, 1 class  (")
    assert "no errors" in out and "classes: cat 8" in out and "boxes: side" in out


def test_problems_are_grouped_and_counted_with_examples(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(damage_masks)
    result = tmp_path / "report.json"
    assert main(["check-data", "pets_train", "--json", str(result)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^error +rle-size +7 x  \w", out, re.MULTILINE)
    assert re.search(r"annotation 1 \(annotations\[0\]\) of image 1 'a.png' .*\[9, 9\]", out)
    assert "annotation 5 (" in out and "annotation 6 (" not in out and "... 2 more" in out
    assert "repair: removes the annotation" in out
    (found,) = json.loads(result.read_text())
    problems = [p for p in found["problems"] if p["kind"] == "rle-size"]
    assert [(p["id"], p["image_id"], p["severity"]) for p in problems] == [
        (number, 1, "error") for number in range(1, 8)
    ]


def test_repair_writes_a_json_that_passes(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(damage_masks)
    before = source.read_text()
    repaired = tmp_path / "repaired.json"
    assert main(["check-data", "pets_train", "--repair", str(repaired)]) == 0
    out = capsys.readouterr().out
    assert "keeps 1 of 1 images, 1 of 8 annotations" in out and "repaired: 7 rle-size" in out
    assert source.read_text() == before
    direct = ["--json-file", str(repaired), "--image-root", str(source.parent / "images")]
    assert main(["check-data", *direct]) == 0
    capsys.readouterr()

    assert "exists" in refusal(capsys, "pets_train", "--repair", str(repaired))
    assert main(["check-data", "pets_train", "--repair", str(repaired), "--overwrite"]) == 0
    capsys.readouterr()
    assert "is the json to check" in refusal(
        capsys, "pets_train", "--repair", str(source), "--overwrite"
    )
    absent = str(tmp_path / "absent" / "x.json")
    assert "folder that exists" in refusal(capsys, "pets_train", "--repair", absent)


def test_a_repair_that_keeps_nothing_writes_nothing(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repaired = tmp_path / "repaired.json"
    for damage, lost in (
        (lambda coco: coco["images"][0].update(file_name="b.png"), "1 images (1 file-missing)"),
        (
            lambda coco: [a.update(segmentation=[[1, 2]]) for a in coco["annotations"]],
            "8 annotations (8 polygon-short)",
        ),
    ):
        make(damage)
        assert main(["check-data", "pets_train", "--repair", str(repaired)]) == 1
        error = capsys.readouterr().err
        assert f"not written: {repaired}" in error and f"would keep 0 of {lost}" in error
        assert not repaired.exists()


def test_invalid_json_cannot_be_repaired(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(lambda _: "{")
    repaired = tmp_path / "repaired.json"
    assert main(["check-data", "pets_train", "--repair", str(repaired)]) == 1
    assert "cannot be repaired" in capsys.readouterr().err
    assert not repaired.exists()


def test_invalid_arguments_give_one_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    assert "did you mean 'pets_train'?" in refusal(capsys, "pets_trian")
    assert "names of data sets" in refusal(capsys)
    assert "--image-root" in refusal(capsys, "--json-file", __file__)
    assert "'a.json'" in refusal(capsys, "--json-file", "a.json", "--image-root", ".")
    assert "one data set at a time" in refusal(capsys, "pets_train", "b", "--repair", "x")
    assert "is missing" in refusal(capsys, "coco_2017_val")
    assert "not in COCO format" in refusal(capsys, "cityscapes_fine_instance_seg_val")


def test_data_sets_are_compared_with_each_other_and_with_anchors(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    make(split="val")
    config = str(ROOT / "configs" / "quickstart.yaml")
    assert main(["check-data", "pets_train", "pets_val", "--config-file", config]) == 0
    out = capsys.readouterr().out
    assert "all images of pets_val (1) are also in pets_train" in out
    assert "image 1 'a.png' (images[0]) is also 'a.png' of pets_val" in out
    assert out.count("anchors: best IoU") == 2


def test_classes_and_keypoints_that_train_net_would_refuse_are_found(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def keypoints(names: list[str]) -> Callable[[dict[str, Any]], None]:
        def change(coco: dict[str, Any]) -> None:
            coco["categories"][0]["keypoints"] = names
            for annotation in coco["annotations"]:
                annotation["keypoints"] = [3, 4, 2] * len(names)

        return change

    make(keypoints(["left", "right"]))
    make(lambda coco: coco["categories"].append({"id": 2, "name": "dog"}), split="val")
    make(keypoints(["right", "left"]), split="test")
    assert main(["check-data", "pets_train", "pets_val"]) == 1
    out = capsys.readouterr().out
    assert "classes differ: pets_train has 1 (cat), pets_val has 2 (cat, dog)" in out
    make(lambda coco: coco["categories"][0].update(name=" Cat"), split="other")
    assert main(["check-data", "pets_train", "pets_other"]) == 1
    assert "only case, spaces or the Unicode form differ" in capsys.readouterr().out
    assert main(["check-data", "pets_train", "pets_test"]) == 1
    out = capsys.readouterr().out
    assert "keypoints differ: pets_train has 2 (left, right), pets_test has 2 (right, left)" in out
    make(split="test")  # without keypoints
    assert main(["check-data", "pets_train", "pets_test"]) == 0


def test_class_names_cannot_control_the_terminal(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(coco: dict[str, Any]) -> None:
        coco["categories"][0]["name"] = "\x1b[2J\nerror\ud800"
        coco["images"][0]["file_name"] = "\x1b[2Jx"

    make(damage)
    assert main(["check-data", "pets_train"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2J\nerror\ud800" in out


@pytest.mark.slow
def test_names_in_other_letters_work_in_any_locale(make: Make, tmp_path: Path) -> None:
    path = make()
    coco = content()
    coco["images"][0]["file_name"] = "größe.png"
    coco["categories"][0]["name"] = "corrosão"
    path.write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
    (path.parent / "images" / "a.png").rename(path.parent / "images" / "größe.png")
    script = """if True:
        from mask_rcnn_tools.cli import main
        from mask_rcnn_plus.data import class_names, require_dataset
        code = main(["check-data", "pets_train"])
        import os
        image = os.fsencode(require_dataset("pets_train")[0]["file_name"])
        print("DONE", code, ascii(class_names("pets_train")), ascii(image.decode()[-9:]))
    """
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **locale},
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    last = f"DONE 0 {['corrosão']!a} {'größe.png'!a}"
    assert last.encode() in result.stdout, result.stdout
    assert b"file-renamed" not in result.stdout and b"other names" not in result.stdout


HOSTILE: list[Callable[[dict[str, Any]], Any]] = [
    lambda coco: "[" * 1_000_000,
    lambda coco: '{"images": 1' + "0" * 1_000_000 + "}",
    lambda coco: "\x00" * 100,
    lambda coco: coco["annotations"][0].update(
        segmentation={"size": [20, 30], "counts": [2**40, 2**40]}
    ),
    lambda coco: coco["annotations"][0].update(
        segmentation={"size": [2**31, 2**31], "counts": [0, 2**62]}
    ),
    lambda coco: coco["annotations"][0].update(
        segmentation={"size": [20, 30], "counts": "o" * 100_000}
    ),
    lambda coco: coco["annotations"][0].update(
        segmentation={"size": [20, 30], "counts": [1] * 599 + [-1, 2]}
    ),
    lambda coco: coco["annotations"][0].update(
        segmentation=[[float("nan"), 1, 5, float("inf"), 1e300, -1e300]]
    ),
    lambda coco: coco["annotations"][0].update(segmentation=[[0, 0, 1e9, 1e9, -1e9, 5] * 1000]),
    lambda coco: coco["annotations"][0].update(segmentation=[["nan"] * 6]),
    lambda coco: coco["images"][0].update(height=2**62, width=2**62),
    lambda coco: coco["images"][0].update(file_name="/dev/zero"),
    lambda coco: coco["images"][0].update(file_name="../../../../../../etc/passwd"),
    lambda coco: coco["images"][0].update(file_name="$(touch witness)`touch witness`"),
    lambda coco: coco["annotations"].extend([dict(coco["annotations"][0])] * 20_000),
]

# Checks each data set, then loads it like DATA_CHECK off.
_SCRIPT = """
import sys, time
from mask_rcnn_plus import UserError
from mask_rcnn_plus.data import require_dataset
from mask_rcnn_tools.cli import main
for name in sys.argv[1:]:
    start = time.monotonic()
    code = main(["check-data", name])
    try:
        require_dataset(name, training=True)
    except UserError as error:
        pass
    print("DONE", name, code, time.monotonic() - start < 10)
"""


@pytest.mark.slow
def test_hostile_jsons_give_a_result(make: Make, tmp_path: Path) -> None:
    for number, damage in enumerate(HOSTILE):
        make(damage, split=f"h{number}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    names = [f"pets_h{number}" for number in range(len(HOSTILE))]
    # One process for all, to import torch only once. A crash would end it.
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *names],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    done = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("DONE")]
    assert result.returncode == 0, result.stderr[-2000:]
    assert done == [[name, "1", "True"] for name in names]
    assert "root:" not in result.stdout and not list(tmp_path.rglob("witness"))
