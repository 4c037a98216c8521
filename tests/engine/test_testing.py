"""Evaluations: what they write, how a killed one continues, and TEST.OPTIMIZE."""

import csv
import json
import os
import signal
import socket
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.engine import Trainer, main
from mask_rcnn_plus.engine.testing import evaluation_model
from mask_rcnn_plus.evaluation import Journal
from mask_rcnn_plus.optimization import OptimizedRCNN

# After two iterations few detections pass the usual threshold.
KEYS = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.PREVIEW_IMAGES", "3"]


def command(run: Path, weights: Path, output: Path, *more: str) -> list[str]:
    arguments = ["--config-file", str(run / "config.yaml"), "--eval-only", "MODEL.WEIGHTS"]
    return [*arguments, str(weights), "OUTPUT_DIR", str(output), *KEYS, *more]


def die_after(images: int) -> None:
    """Kills this process in the middle of writing its next image."""
    add, count = Journal.add, 0

    def add_or_die(self: Journal, entry: Any) -> None:
        nonlocal count
        add(self, entry)
        count += 1
        if count > images:
            os.truncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - 10)
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = add_or_die


def killed_after(images: int, arguments: list[str]) -> None:
    """Runs the command in a process that is killed in the middle of writing its next image."""

    def run() -> None:
        die_after(images)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main(arguments)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def in_two_processes(arguments: list[str], *, dies: bool = False) -> list[int | None]:
    """Runs the command in two processes, as torchrun does; returns their exit codes.

    Args:
        arguments: the arguments of the command.
        dies: whether the first process is killed at its second image.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(rank: int) -> None:
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
        os.environ |= {**places, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if dies and rank == 0:
            die_after(1)
        sys.exit(main(arguments))

    processes = [get_context("fork").Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the ids of the images that a model runs on."""
    images: list[int] = []
    inference = GeneralizedRCNN.inference

    def counted(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        images.extend(image["image_id"] for image in batch)
        return inference(self, batch, *args, **kwargs)

    monkeypatch.setattr(GeneralizedRCNN, "inference", counted)
    # Otherwise the patched model would not count as detectron2's, and would be called directly.
    monkeypatch.setattr("mask_rcnn_plus.evaluation.inference.can_split", lambda model: True)
    return images


def files(output: Path) -> dict[str, bytes]:
    """The files that two evaluations of the same weights must share."""
    folder = output / "inference" / "shapes_val"
    names = [folder / "coco_instances_results.json", folder / "summary.csv"]
    return {path.name: path.read_bytes() for path in [*names, *output.glob("preview_*.png")]}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_evaluation_continues_at_its_image(
    trained: Path, shapes: Path, tmp_path: Path, seen: list[int]
) -> None:
    weights = trained / "model_final.pth"
    assert main(command(trained, weights, tmp_path / "whole")) == 0
    every = list(seen)
    assert len(every) == 3
    cut = tmp_path / "cut"
    killed_after(1, command(trained, weights, cut))
    killed_after(1, command(trained, weights, cut))
    assert (cut / "inference/shapes_val/journal").is_dir()
    seen.clear()
    assert main(command(trained, weights, cut)) == 0
    assert seen == every[2:]
    assert files(cut) == files(tmp_path / "whole")
    metrics = [
        json.loads((run / "inference/shapes_val/metrics.json").read_text())
        for run in (cut, tmp_path / "whole")
    ]
    assert len(files(cut)) == 3 and str(metrics[0]["segm"]) == str(metrics[1]["segm"])
    assert not (cut / "inference/shapes_val/journal").exists()
    # It is complete: the same command starts another evaluation.
    assert main(command(trained, weights, cut)) == 0
    assert seen == every[2:] + every


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_killed_processes_end_with_the_files_of_one(
    trained: Path, shapes: Path, tmp_path: Path
) -> None:
    weights = trained / "model_final.pth"
    assert main(command(trained, weights, tmp_path / "one")) == 0
    assert in_two_processes(command(trained, weights, tmp_path / "two")) == [0, 0]
    cut = tmp_path / "cut"
    first, second = in_two_processes(command(trained, weights, cut), dies=True)
    assert first == -signal.SIGKILL and second != 0  # it waited for the first
    left = cut / "inference/shapes_val/journal"
    assert sorted(path.name for path in left.iterdir()) == ["process0.jsonl", "process1.jsonl"]
    assert in_two_processes(command(trained, weights, cut)) == [0, 0]
    assert "2 images are done" in (cut / "log.txt").read_text()
    expected = files(tmp_path / "one")
    assert len(expected) == 3
    all_metrics = []
    for run in ("one", "two", "cut"):
        assert files(tmp_path / run) == expected
        folder = tmp_path / run / "inference/shapes_val"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics.pop("speed")["processes"] == (1 if run == "one" else 2)
        all_metrics.append(str(metrics))
        assert not (folder / "journal").exists()
    assert all_metrics == all_metrics[:1] * 3


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("changed", ["weights", "settings", "image", "json", "nothing", "off"])
def test_results_of_another_evaluation_are_never_reused(
    changed: str, trained: Path, shapes: Path, tmp_path: Path, seen: list[int]
) -> None:
    weights, more = trained / "model_final.pth", []
    killed_after(1, command(trained, weights, tmp_path))
    json_file = shapes / "shapes/val.json"
    image = shapes / "shapes/images" / json.loads(json_file.read_text())["images"][0]["file_name"]
    before = image.stat().st_mtime_ns, json_file.read_text()
    if changed == "weights":
        checkpoint = torch.load(weights, weights_only=True)
        checkpoint["model"]["roi_heads.box_predictor.bbox_pred.bias"][0] += 1e-6
        weights = tmp_path / "other.pth"
        torch.save(checkpoint, weights)
    elif changed == "settings":
        more = ["INPUT.MIN_SIZE_TEST", "60"]
    elif changed == "off":
        more = ["TEST.RESUME", "False"]
    elif changed == "image":
        os.utime(image)
    elif changed == "json":
        json_file.write_text(before[1] + " ")
    try:
        assert main(command(trained, weights, tmp_path, *more)) == 0
    finally:
        os.utime(image, ns=(before[0], before[0]))
        json_file.write_text(before[1])
    assert len(seen) == (2 if changed == "nothing" else 3)


def test_an_evaluation_writes_the_files_that_a_report_needs(trained: Path, shapes: Path) -> None:
    folder = trained / "inference" / "shapes_val"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert Path(evaluation["json_file"]).is_file() and Path(evaluation["image_root"]).is_dir()
    assert evaluation["class_names"] == ["circle", "square", "triangle"]
    assert evaluation["category_ids"] == [1, 2, 3] and "MAX_ITER: 2" in evaluation["config"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm", "boundary", "speed"}
    with (folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["class"]) for row in rows] == [
        (task, name)
        for task in ("bbox", "segm", "boundary")
        for name in ("all", "circle", "square", "triangle")
    ]
    assert float(rows[0]["AP"]) == metrics["bbox"]["AP"]


ENABLED = ["TEST.OPTIMIZE.ENABLED", "True"]


def test_an_optimized_copy_has_the_current_weights(
    tiny_config: Path,
) -> None:
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = load_config(tiny_config, classes)
    model = Trainer.build_model(cfg)
    assert evaluation_model(cfg, model) is model

    cfg = load_config(tiny_config, [*classes, *ENABLED, "TEST.OPTIMIZE.DTYPE", "bf16"])
    fast = evaluation_model(cfg, model)
    assert isinstance(fast, OptimizedRCNN) and fast.optimization_report.dtype == "bf16"
    assert evaluation_model(cfg, fast) is fast
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.fill_(7.0)
    assert fast.roi_heads.box_predictor.cls_score.bias.max() < 1
    later = evaluation_model(cfg, model)
    assert later.roi_heads.box_predictor.cls_score.bias.eq(7).all()

    cfg = load_config(tiny_config, [*classes, *ENABLED, "TEST.OPTIMIZE.DTYPE", "fp16"])
    with pytest.raises(UserError, match="'bf16'"):
        evaluation_model(cfg, model)


@pytest.mark.slow
def test_a_run_evaluates_the_copy_and_continues_training(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--config-file", str(tiny_config)]
    keys = ["TEST.EVAL_PERIOD", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    assert main([*run, *keys, *ENABLED]) == 0
    assert capsys.readouterr().out.count("The model is optimized for fp32 on cpu") == 2
    output = tmp_path / "output"
    trained = json.loads((output / "inference/shapes_val/metrics.json").read_text())
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "b")]
    assert main([*run, "--eval-only", *keys, *weights]) == 0
    plain = json.loads((tmp_path / "b/inference/shapes_val/metrics.json").read_text())
    for task in ("bbox", "segm"):
        assert trained[task] == pytest.approx(plain[task], abs=0.1, nan_ok=True)


@pytest.mark.parametrize("mode", [["--eval-only", "MODEL.WEIGHTS", "never_read.pth"], []])
def test_fp16_on_a_cpu_is_refused_before_anything_is_read(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    fp16 = ["TEST.OPTIMIZE.DTYPE", "fp16", "MODEL.DEVICE", "cpu"]
    folder = ["OUTPUT_DIR", str(tmp_path / "never_made")]
    assert main(["--config-file", str(tiny_config), *mode, *ENABLED, *fp16, *folder]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: TEST.OPTIMIZE.DTYPE is 'fp16'")
    assert err.count("\n") == 1 and not (tmp_path / "never_made").exists()
