"""The page shows what a run contains, loads nothing, and treats names as text."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask_rcnn_tools.cli import main
from tests.tools.report.conftest import HOSTILE, MakeRun

OBJECTS = [(1, 1, [5.0, 5, 20, 20]), (1, 2, [35.0, 35, 20, 20]), (2, 1, [10.0, 10, 30, 30])]
FOUND = [(1, 1, [5.0, 5, 20, 20], 0.9), (1, 1, [35.0, 35, 20, 20], 0.8)]
MORE = [*FOUND, (1, 2, [35.0, 35, 20, 20], 0.85), (2, 1, [10.0, 12, 30, 30], 0.7)]


class Page(html.parser.HTMLParser):
    """The text, the tags and the links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str | None] = []
        self.text = ""
        self._style = False
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._style = tag == "style"
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")]
        self.addresses += [values[k] or "" for k in ("src", "href", "srcset") if k in values]
        if tag == "img":
            self.alts.append(values.get("alt"))

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data + " "


def report(*arguments: Any) -> Page:
    """Runs the command and returns the page that --output names."""
    argv = [str(a) for a in arguments]
    assert main(["report", *argv]) == 0
    return Page(Path(argv[argv.index("--output") + 1]))


def test_a_page_contains_everything_and_no_code(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", FOUND, objects=OBJECTS)
    page = report(run, "--output", tmp_path / "page.html")
    assert HOSTILE in page.text and "<script" not in page.source
    assert "49" not in page.text.replace(str(tmp_path), "")  # the result of 7*7 in the hostile name
    assert "script" not in page.tags and "iframe" not in page.tags
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    assert not re.search(r"url\(|@import|https?://", page.source)
    assert page.tags.count("img") > 8 and all(page.alts)
    # Text in plots is inside images, in base64.
    assert "$\\frac" in page.text


def test_a_page_names_missing_metrics_logs_and_images(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", FOUND, objects=OBJECTS, files=("gone/a.png", "../b.png"))
    (run / "inference/mine_val/evaluation.json").write_text(
        json.dumps({"json_file": str(tmp_path / "val.json")})
    )
    page = report(run, "--output", tmp_path / "page.html")
    for sentence in (
        "There is no metrics.json or summary.csv beside the detections",
        "There are no metrics by class",
        "There is no metrics.json with losses in the run's folder",
        "The evaluation did not record its speed.",
        "The evaluation did not record its versions.",
        "There is no config.yaml in the run's folder.",
        "Not shown, because the image is not in",
        "../b.png, gone/a.png",
    ):
        assert sentence in page.text


def test_nan_and_limits_are_explained(make_run: MakeRun, tmp_path: Path) -> None:
    objects = [(1, 1, [5.0 * i, 0, 4, 4]) for i in range(10)]
    run = make_run("run", [(1, 1, [0.0, 0, 4, 4], 0.9)], objects=objects, limit=8)
    metrics = {"segm": {"AP": 1.0, "APs": 1.0, "APm": -1, "APl": float("nan")}}
    (run / "inference/mine_val/metrics.json").write_text(json.dumps(metrics))
    page = report(run, "--output", tmp_path / "page.html")
    for sentence in (
        "no medium objects (from 32 x 32 to 96 x 96 pixels), so APm",
        "no large objects (above 96 x 96 pixels), so APl",
        f"AP is not defined for {HOSTILE}: the ground truth has no object of this class",
        "1 image has more than 8 objects, but TEST.DETECTIONS_PER_IMAGE allows only 8 detections: "
        "recall cannot exceed 80.0 %, which limits AP too. Set it to 10 or more",
        "There is no boundary AP",
    ):
        assert sentence in page.text
    assert "so APs" not in page.text and " nan" not in page.text


def test_no_objects_and_no_detections(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(make_run("run", [], objects=[]), "--output", tmp_path / "page.html")
    assert "No AP is defined: the ground truth has no objects." in page.text
    assert "The model found nothing" in page.text
    assert "No image has objects or detections." in page.text
    for phrase in (
        "share of detections that are right",
        "share of objects that are found",
        "score threshold of this",
    ):
        assert phrase not in page.text
    # Without objects, all detections are wrong and there is no recall.
    page = report(make_run("wrong", FOUND, objects=[]), "--output", tmp_path / "wrong.html")
    assert "share of detections that are right" in page.text
    assert "share of objects that are found" not in page.text


def test_objects_without_detections(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", [], objects=OBJECTS)
    page = report(run, "--output", tmp_path / "page.html")
    assert "The model found nothing, so AP is 0" in page.text
    assert "2 objects, 2 missed" in " ".join(filter(None, page.alts))
    assert "no detection there" in page.text
    for phrase in (
        "share of detections that are right",
        "share of objects that are found",
        "score threshold of this",
    ):
        assert phrase not in page.text
    assert "no detections" in page.text.partition("Calibration")[2].partition("Images")[0]
    assert "Best images" not in page.text
    better = make_run("better", FOUND, objects=OBJECTS)
    both = report(run, better, "--output", tmp_path / "both.html")
    assert "It finds 1 object that run misses, and misses 0 that run finds." in both.text


def test_a_report_compares_two_runs(make_run: MakeRun, tmp_path: Path) -> None:
    before = make_run("before", FOUND, objects=OBJECTS)
    after = make_run("after", MORE, objects=OBJECTS)
    page = report(before, after, "--output", tmp_path / "page.html")
    assert "Of 2 images, after is better on 2, worse on 0, and equal on 0." in page.text
    assert "It finds 2 objects that before misses, and misses 0 that before finds." in page.text
    assert "No image got worse." in page.text
    # a.png, before (threshold 0.9): 1 right of 1 detection, 2 objects: 1 / 1.5. After (0.7): 2
    # right of 3 detections: 2 / 2.5. b.png, before: no detection. After: an IoU of 28 / 32.
    assert "a.png 0.67 0.80 +0.13 1 0" in page.text
    assert "b.png 0.00 0.88 +0.88 1 0" in page.text
    assert "Keys that differ" in page.text and "SEED 2 4" in page.text

    back = report(after, before, "--output", tmp_path / "page.html")
    assert "No image improved." in back.text and "+0.13" not in back.text


def test_the_metrics_are_those_of_the_evaluation(
    trained: Path, shapes: Path, tmp_path: Path
) -> None:
    page = report(trained, "--output", tmp_path / "page.html")
    metrics = json.loads((trained / "inference/shapes_val/metrics.json").read_text())
    assert f"AP {metrics['bbox']['AP']:.1f} {metrics['segm']['AP']:.1f}" in page.text
    for word in (
        "circle",
        "triangle",
        "images per second",
        "shapes_train",
        "torchvision",
        "MAX_ITER",
    ):
        assert word in page.text


def test_a_page_of_many_large_images_stays_small(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mask_rcnn_tools.report.pictures.MAX_BYTES", 1500)
    page = report(make_run("run", MORE, objects=OBJECTS), "--output", tmp_path / "page.html")
    assert "Some pictures are left out to keep the page below 20 MB." in page.text


def error_line(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and len(lines) == 1
    return lines[0]


def test_user_errors_are_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run", FOUND, objects=OBJECTS)
    other = make_run("other", FOUND, objects=OBJECTS[:2], ground_truth="other")
    letter = tmp_path / "letter.html"
    letter.write_text("Dear Sir")
    folder = run / "inference/mine_val"
    assert "none' does not exist" in error_line(capsys, tmp_path / "none")
    assert "was not evaluated on 'mine_vla'; did you mean 'mine_val'?" in error_line(
        capsys, run, "--data", "mine_vla"
    )
    assert "has no inference/" in error_line(capsys, tmp_path / "images")
    assert "differ in images, classes or objects" in error_line(capsys, run, other)
    assert "are the same folder" in error_line(capsys, run, run)
    assert "is not a report" in error_line(capsys, run, "--output", letter)
    assert letter.read_text() == "Dear Sir"
    assert "a folder that exists" in error_line(
        capsys, run, "--output", tmp_path / "no" / "page.html"
    )
    missing = tmp_path / "gone"
    assert "gone' does not exist" in error_line(capsys, run, "--image-root", missing)
    assert "is not a folder" in error_line(capsys, run, "--image-root", letter)
    assert "whole number of at least 1" in error_line(capsys, run, "--images", "0")
    assert "at most 100" in error_line(capsys, run, "--images", "101")
    results = json.loads((folder / "coco_instances_results.json").read_text())
    for key, value, message in (
        ("score", float("nan"), "the score nan"),
        ("bbox", [1, 2], "the bbox [1, 2]"),
        ("segmentation", {"size": [64, 64], "counts": "zzzz"}, "RLE"),
        ("segmentation", [[1, 2, 3]], "not a run-length encoding"),
    ):
        broken = [{**results[0], key: value}]
        (folder / "coco_instances_results.json").write_text(json.dumps(broken))
        assert message in error_line(capsys, run)
    (folder / "coco_instances_results.json").write_text("[{")
    assert "cannot read the detections" in error_line(capsys, run)
    (tmp_path / "val.json").unlink()
    assert "is missing: give --json-file" in error_line(capsys, run)
    (folder / "evaluation.json").unlink()
    assert "does not say which data it was evaluated on" in error_line(capsys, run)


def test_the_default_page_is_in_the_runs_folder_and_is_overwritten(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run", FOUND, objects=OBJECTS)
    for _ in range(2):
        assert main(["report", str(run)]) == 0
        assert capsys.readouterr().out == f"{run / 'report_mine_val.html'}\n"
    assert [p.name for p in run.glob("*.html*")] == ["report_mine_val.html"]


def test_pictures_show_missed_objects_and_wrong_detections(make_run: MakeRun) -> None:
    import base64

    import cv2

    from mask_rcnn_tools.report.pictures import MISSED_COLOR, RIGHT_COLOR, WRONG_COLOR, Pictures
    from mask_rcnn_tools.report.run import read_run

    folder = make_run("run", FOUND, objects=OBJECTS)
    run = read_run(folder, label="run")
    pictures = Pictures()
    grey = 60
    # A wrong detection around a small object, and a missed object around a small detection.
    about = read_run(
        make_run(
            "about",
            [(1, 2, [8.0, 8, 30, 30], 0.9), (2, 1, [20.0, 20, 10, 10], 0.8)],
            objects=[(1, 1, [10.0, 10, 24, 24]), (2, 1, [4.0, 4, 50, 50])],
            ground_truth="about",
        ),
        label="about",
    )

    def mean_of(picture: Any, box: list[float]) -> np.ndarray:
        data = base64.b64decode(picture.source.split(",", 1)[1])
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        scale = image.shape[0] / 64
        x, y, w, h = (round(scale * v) for v in box)
        # The middle half, away from outlines and labels.
        return image[y + h // 4 : y + 3 * h // 4, x + w // 4 : x + 3 * w // 4].mean(axis=(0, 1))

    def tinted(color: tuple[int, int, int]) -> Any:
        return pytest.approx(0.4 * np.array(color) + 0.6 * grey, abs=8)

    truth, detections = pictures.truth(run, 0, 0.5), pictures.detections(run, 0, 0.5)
    assert mean_of(truth, OBJECTS[0][2]) == tinted(RIGHT_COLOR)
    assert mean_of(truth, OBJECTS[1][2]) == tinted(MISSED_COLOR)
    assert mean_of(detections, OBJECTS[0][2]) == tinted(RIGHT_COLOR)
    assert mean_of(detections, OBJECTS[1][2]) == tinted(WRONG_COLOR)
    assert truth.text == "2 objects, 1 missed" and detections.text == "2 detections, 1 wrong"
    # The subject of a picture is drawn over its surroundings.
    assert mean_of(pictures.mistake(about, 0), [12, 12, 20, 20]) == tinted(WRONG_COLOR)
    missed = pictures.missed(about, 1, 0.5)
    grey = 140
    assert mean_of(missed, [22, 22, 6, 6]) == tinted(MISSED_COLOR)


def test_among_equally_bad_images_the_one_with_more_objects_comes_first(
    make_run: MakeRun, tmp_path: Path
) -> None:
    files = ("a.png", "b.png", "c.png", "d.png")
    objects = [(i, 1, [20.0 * k, 5, 15, 15]) for i in (1, 2, 3, 4) for k in range(1 + (i % 2 == 0))]
    detections = [(i, 1, box, 0.9) for i, _, box in objects if i > 2]
    run = make_run("run", detections, objects=objects, files=files)
    page = report(run, "--output", tmp_path / "page.html")
    names = re.findall(r"(\w\.png) quality ([\d.]+)", page.text)
    assert names == [("b.png", "0.00"), ("a.png", "0.00"), ("d.png", "1.00"), ("c.png", "1.00")]
