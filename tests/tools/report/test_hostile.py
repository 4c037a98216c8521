"""A run's folder may come from someone else: any content gives a page or one error line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_tools.cli import main
from tests.tools.report.conftest import MakeRun

BOX = [5.0, 5, 20, 20]
METRICS = {"bbox": {"AP": 50.0, "APl": float("nan"), "AP-one": 50.0}}
SPEED = {
    **dict.fromkeys(("images", "processes"), 2),
    **dict.fromkeys(("seconds", "images_per_second", "data_ms", "inference_ms"), 1.5),
    **dict.fromkeys(("evaluation_ms", "peak_memory_mib"), 1.5),
    "postprocessing_ms": None,
    "peak_memory_kind": "memory",
    "device": "cpu",
}
SUMMARY = (
    "task,class_id,class,AP,AP50,AP75,APs,APm,APl,AR1,AR10,ARmax,ARs,ARm,ARl,max_dets,objects,"
    "detections\nbbox,,all,1,2,3,4,5,6,7,8,9,1,1,1,100,1,1\nbbox,1,one,1,2,3,4,5,6,7,8,9,1,1,1,"
)


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    run = make_run("run", [(1, 1, BOX, 0.9)], objects=[(1, 1, BOX)], versions={"torch": "2"})
    results = run / "inference/mine_val"
    (results / "metrics.json").write_text(json.dumps({**METRICS, "speed": SPEED}))
    (results / "summary.csv").write_text(SUMMARY + "100,1,1\n")
    (run / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    (run / "config.yaml").write_text("SEED: 1\n")
    return run


def change(path: Path, key: str, value: Any) -> None:
    content = json.loads(path.read_text())
    inner = content
    *above, last = key.split(".")
    for name in above:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[last] = value
    path.write_text(json.dumps(content))


def error_line(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(run.parent.rglob("*"))
    assert main(["report", str(run)]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and "Traceback" not in captured.err and len(line) < 600
    assert sorted(run.parent.rglob("*")) == before
    return line


def test_a_sound_run_makes_a_page(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    assert "1.5 ms per image" in (run / "report_mine_val.html").read_text()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("evaluation.json", "json_file", 5),
        ("evaluation.json", "image_root", ["a"]),
        ("evaluation.json", "image_root", "a\ud800"),
        ("evaluation.json", "image_root", "a\0"),
        ("evaluation.json", "detections_per_image", "many"),
        ("evaluation.json", "detections_per_image", 10**30),
        ("evaluation.json", "score_threshold", "low"),
        ("evaluation.json", "weights", {}),
        ("evaluation.json", "date", 2020),
        ("evaluation.json", "versions", ["torch"]),
        ("evaluation.json", "versions", {"torch": 2}),
        ("evaluation.json", "config", {"SEED": 1}),
        ("evaluation.json", "config", "SEED: [1"),
        ("metrics.json", "bbox", [1]),
        ("metrics.json", "bbox.AP", "high"),
        ("metrics.json", "bbox.AP", True),
        ("metrics.json", "bbox.AP", 10**400),
        ("metrics.json", "speed", "fast"),
        ("metrics.json", "speed.device", None),
        ("metrics.json", "speed.images_per_second", "2"),
        ("coco_instances_results.json", "0.score", 10**400),
        ("coco_instances_results.json", "0.score", "0.9"),
        ("coco_instances_results.json", "0.score", 1.5),
        ("coco_instances_results.json", "0.bbox", [0, 0, 1e300, 1]),
        ("coco_instances_results.json", "0.bbox", "wide"),
        ("coco_instances_results.json", "0.image_id", [1]),
        ("coco_instances_results.json", "0.category_id", {}),
        ("coco_instances_results.json", "0.segmentation.counts", [1, 2]),
    ],
)
def test_a_wrong_type_is_named_in_one_line(
    file: str, key: str, value: Any, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run / "inference/mine_val" / file, key, value)
    line = error_line(run, capsys)
    assert file in line or "config" in line
    assert key.split(".")[-1] in line or "RLE" in line or "lacks" in line


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("evaluation.json", "[1]"),
        ("evaluation.json", "[" * 100_000),
        ("metrics.json", '"text"'),
        ("summary.csv", "a,b\n1,2\n"),
        ("summary.csv", SUMMARY + "100,one,1\n"),
        ("summary.csv", SUMMARY + "100,1,1,5,6\n"),
        ("summary.csv", SUMMARY + "1" * 200_000 + ",1,1\n"),
        ("coco_instances_results.json", "[" + '{"a":' * 100_000),
    ],
)
def test_a_file_with_other_content_is_named_in_one_line(
    file: str, text: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "inference/mine_val" / file).write_text(text)
    assert file in error_line(run, capsys)


def test_aliases_in_a_config_are_not_expanded(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run / "inference/mine_val/evaluation.json", "config", "")
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 40)]
    (run / "config.yaml").write_text("\n".join(lines))
    assert "aliases" in error_line(run, capsys)


def test_a_page_stays_in_the_folder_of_its_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = run / "inference/mine_val/evaluation.json"
    change(evaluation, "data_set", "x/../../ESC")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report_mine_val.html'}\n"
    assert not list(tmp_path.rglob("*ESC*"))
    # A link does not lead out of it either.
    (run / "report_mine_val.html").unlink()
    (run / "report_mine_val.html").symlink_to(tmp_path / "elsewhere.html")
    assert main(["report", str(run)]) == 0
    assert not (tmp_path / "elsewhere.html").exists()
    assert not (run / "report_mine_val.html").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("file", ["inference/mine_val/evaluation.json", "metrics.json"])
def test_a_pipe_does_not_block(file: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / file).unlink()
    os.mkfifo(run / file)
    assert file in error_line(run, capsys)


def test_odd_values_that_a_page_can_show(run: Path, tmp_path: Path) -> None:
    truth = tmp_path / "val.json"
    for key, value in (
        ("annotations.0.area", "large"),
        ("categories.0.name", "\x1b[2J\x00 \u202e 猫"),
        ("images.0.file_name", "a\x00b\ud800.png"),
    ):
        change(truth, key, value)
    rows = ['{"iteration": 2, "lr": 1e400, "x": "y", "\\u0000loss": 3}', "[", "[" * 9999, "5"]
    with (run / "metrics.json").open("a") as file:
        file.write("\n".join(rows))
    assert main(["report", str(run)]) == 0
