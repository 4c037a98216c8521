"""train_net.py as a user runs it: training, resuming, evaluating, and every error."""

import errno
import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import GeneralizedRCNN

from mask_rcnn_plus import get_cfg, load_config
from mask_rcnn_plus.engine import Trainer, main
from mask_rcnn_plus.engine.main import _print_next_steps
from mask_rcnn_tools.check.before_run import check_data


def run(config: Path, *arguments: str) -> int:
    return main(["--config-file", str(config), *arguments], check_data=check_data)


def test_training_leaves_what_users_of_detectron2_expect(trained: Path) -> None:
    for name in ("model_final.pth", "last_checkpoint", "config.yaml", "log.txt", "metrics.json"):
        assert (trained / name).is_file(), name
    assert list(trained.glob("events.out.tfevents*"))
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert any("total_loss" in line for line in lines)
    assert any("segm/AP" in line for line in lines)


def test_the_log_has_more_than_the_screen(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_config, "TEST.PREVIEW_IMAGES", "0") == 0
    screen = capsys.readouterr().out
    log = (tmp_path / "output" / "log.txt").read_text()
    assert f"Full log: {tmp_path}/output/log.txt" in screen
    assert "Running with full config" in log and "Running with full config" not in screen
    assert "POST_NMS_TOPK_TEST" in log and "POST_NMS_TOPK_TEST" not in screen
    assert "Device: cpu" in screen
    assert "3 classes (id name): 0 circle, 1 square, 2 triangle" in screen


def test_a_run_without_a_data_check_says_so(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-file", str(tiny_config), "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    line = "DATA_CHECK is 'strict', but setup() got no data check"
    assert main(command) == 0
    assert line in capsys.readouterr().out
    assert main([*command, "DATA_CHECK", "off"]) == 0
    assert "DATA_CHECK" not in capsys.readouterr().out
    assert main(command, check_data=check_data) == 0
    assert line not in capsys.readouterr().out


@pytest.mark.parametrize("start", [[Path(sys.executable).name], [sys.executable], ["uv", "run"]])
def test_the_printed_commands_can_be_pasted(
    start: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if start == ["uv", "run"]:
        monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    activated = start != [sys.executable]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) if activated else "")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "my data"))
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "it's mine")
    _print_next_steps(cfg)
    printed = capsys.readouterr().out
    (again,) = [line.split(": ", 1)[1] for line in printed.splitlines() if "--eval-only" in line]
    environment, *command = shlex.split(again)
    assert environment == f"DETECTRON2_DATASETS={tmp_path / 'my data'}"
    assert command[: len(start) + 1] == [*start, "train_net.py"]
    assert command[-1] == str(tmp_path / "it's mine" / "model_final.pth")
    assert main(["--help"]) == 0
    assert f"    {' '.join(start)} train_net.py --resume" in capsys.readouterr().out


def test_the_path_of_the_picture_is_printed_last(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_config) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    picture = Path(last.split(": ", 1)[1])
    assert picture == tmp_path / "output" / "preview_shapes_val.png"
    assert cv2.imread(str(picture)).std() > 5


def test_the_checkpoint_carries_class_names_and_config(trained: Path) -> None:
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    assert checkpoint["class_names"] == ["circle", "square", "triangle"]
    assert "NUM_CLASSES: 3" in checkpoint["config"]


def test_evaluating_the_checkpoint_gives_the_metrics_of_the_training(
    trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(trained / "model_final.pth")
    arguments = ("--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path))
    # The saved config does not need the original's base files, nor the data for -1 classes.
    assert run(trained / "config.yaml", *arguments) == 0
    screen = capsys.readouterr().out
    for word in ("images/s", "inference", "post-processing", "evaluation", "memory"):
        assert word in screen
    again = json.loads((tmp_path / "inference/shapes_val/metrics.json").read_text())
    first = json.loads((trained / "inference/shapes_val/metrics.json").read_text())
    for task in ("bbox", "segm"):
        assert again[task] == pytest.approx(first[task], nan_ok=True)


def test_resume_continues_where_the_run_ended(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "output")
    assert run(tiny_config, "--resume", "SOLVER.MAX_ITER", "3", "TEST.PREVIEW_IMAGES", "0") == 0
    screen = capsys.readouterr().out
    assert f"Resuming from {tmp_path}/output/model_final.pth" in screen
    assert "after 2 iterations" in screen
    assert "Starting training from iteration 2" in screen
    resumed = torch.load(tmp_path / "output/model_final.pth", weights_only=True)
    assert resumed["iteration"] == 2
    # With current torch versions, stock detectron2 0.6 loses both.
    assert resumed["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 3


def test_resume_restores_the_momentum(trained: Path, tiny_config: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "output")
    trainer = Trainer(load_config(tiny_config, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]))
    trainer.resume_or_load(resume=True)
    stored = torch.load(trained / "model_final.pth", weights_only=True)
    momenta = stored["trainer"]["_trainer"]["optimizer"]["state"]
    restored = trainer.optimizer.state_dict()["state"]
    assert momenta.keys() == restored.keys() and len(momenta) > 50
    for key, state in momenta.items():
        assert torch.equal(restored[key]["momentum_buffer"], state["momentum_buffer"])
    assert max(state["momentum_buffer"].abs().max() for state in momenta.values()) > 0


def test_resume_with_another_optimizer_is_refused(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "output")
    message = refusal(
        capsys, tiny_config, "--resume", "SOLVER.OPTIMIZER", "ADAMW", "SOLVER.MAX_ITER", "3"
    )
    assert "SOLVER.OPTIMIZER is 'ADAMW'" in message


def test_incompatible_settings_end_in_one_line(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, tiny_config, "MODEL.RESNETS.DEPTH", "19")
    assert "cannot be built: KeyError: 19" in message
    assert "Traceback" in (tmp_path / "output" / "log.txt").read_text()


def test_resume_without_a_checkpoint_starts_a_run(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_config, "--resume", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()") == 0
    assert "no checkpoint in" in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], config: Path | str, *arguments: str) -> str:
    """The one line on standard error of a run that ends with exit code 2."""
    assert main(["--config-file", str(config), *arguments], check_data=check_data) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.out
    return lines[0]


def test_config_mistakes_are_refused(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no config file" in refusal(capsys, "")
    message = refusal(capsys, tmp_path / "tinny.yaml")
    assert "does not exist" in message and "tiny.yaml'?" in message
    message = refusal(capsys, tiny_config, "SOLVER.MAX_ITERS", "3")
    assert "did you mean 'SOLVER.MAX_ITER'?" in message
    message = refusal(capsys, tiny_config, "SOLVER.MAX_ITER", "many")
    assert "SOLVER.MAX_ITER" in message and "many" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.ROI_HEADS.NAME", "StandartROIHeads", "did you mean 'StandardROIHeads'?"),
        ("MODEL.BACKBONE.NAME", "my_net", "registered: build_resnet_backbone"),
        ("MODEL.ROI_MASK_HEAD.NAME", "FusedMask", "not registered"),
        ("SOLVER.OPTIMIZER", "ADAM", "SGD or ADAMW"),
        ("SOLVER.IMS_PER_BATCH", "0", "IMS_PER_BATCH is 0"),
        ("SOLVER.MAX_ITER", "-5", "must be 1 or more"),
        ("DATASETS.TRAIN", "shapes_train", "write \"('shapes_train',)\""),
        ("OUTPUT_DIR", "", "is empty"),
        ("SOLVER.AMP.ENABLED", "True", "needs a GPU"),
        ("SOLVER.ACCUMULATE_STEPS", "3", "set a divisor"),
        ("SOLVER.AMP.DTYPE", "fp8", "it must be fp16 or bf16"),
        ("MODEL.DEVICE", "meta", "set auto, cpu or cuda"),
        ("OUTPUT_DIR", "x" * 300, "File name too long"),
        ("OUTPUT_DIR", "a\0b", "NUL"),
        ("MODEL.WEIGHTS", "a\0b.pth", "NUL"),
        ("DATASETS.TRAIN", "('a\\udc80',)", "broken Unicode"),
    ],
)
def test_invalid_settings_are_refused(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], key: str, value: str, expected: str
) -> None:
    message = refusal(capsys, tiny_config, key, value)
    assert key in message and expected in message


def test_data_set_mistakes_are_refused(
    tiny_config: Path, shapes_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, tiny_config, "DATASETS.TRAIN", "('shapes_trian',)")
    assert "did you mean 'shapes_train'?" in message and str(shapes_root) in message
    assert "DATASETS.TRAIN is empty" in refusal(capsys, tiny_config, "DATASETS.TRAIN", "()")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not valid json"),
        ('{"hello": 1}', "COCO"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no images"),
    ],
)
def test_broken_json_is_refused(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    expected: str,
) -> None:
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "train.json").write_text(content)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    message = refusal(
        capsys, tiny_config, "DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "()"
    )
    assert expected in message and "train.json" in message


def test_a_missing_image_is_refused(
    tiny_config: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shapes_root / "shapes", tmp_path / "shapes")
    victim = sorted((tmp_path / "shapes").rglob("*.png"))[0]
    victim.unlink()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert victim.name in refusal(capsys, tiny_config)


def edited(
    shapes_root: Path, root: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[dict], None]
) -> None:
    """Sets the data set root to a copy of the shapes with an edited training json."""
    shutil.copytree(shapes_root / "shapes", root / "shapes")
    path = root / "shapes" / "train.json"
    coco = json.loads(path.read_text())
    edit(coco)
    path.write_text(json.dumps(coco))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (None, "mask-missing"),
        ({"size": [64, 63], "counts": [4032]}, "RLE of the size [64, 63]"),
        ({"size": [64, 64], "counts": [10, 5]}, "RLE of 15 pixels"),
        ({"size": [64, 64], "counts": "~~"}, "not run lengths"),
    ],
)
def test_invalid_masks_are_refused(
    tiny_config: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    segmentation: object,
    expected: str,
) -> None:
    def edit(coco: dict) -> None:
        coco["annotations"][0]["segmentation"] = segmentation

    edited(shapes_root, tmp_path, monkeypatch, edit)
    assert expected in refusal(capsys, tiny_config)


def test_an_evaluation_needs_no_training_set_for_keypoints(tiny_config: Path) -> None:
    # An evaluation only loads its test sets.
    cfg = load_config(tiny_config, ["MODEL.KEYPOINT_ON", "True", "DATASETS.TRAIN", "('absent',)"])
    assert len(Trainer.build_test_loader(cfg, "shapes_val")) > 0


def test_missing_keypoints_are_refused(
    tiny_config: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def edit(coco: dict) -> None:
        for annotation in coco["annotations"]:
            del annotation["keypoints"]

    edited(shapes_root, tmp_path, monkeypatch, edit)
    assert "has no keypoints" in refusal(capsys, tiny_config, "MODEL.KEYPOINT_ON", "True")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_named(
    tiny_config: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: str,
) -> None:
    edited(shapes_root, tmp_path, monkeypatch, lambda coco: None)
    for image in (tmp_path / "shapes" / "images").glob("train_*.png"):
        image.write_bytes(image.read_bytes()[:200])
    message = refusal(capsys, tiny_config, "DATALOADER.NUM_WORKERS", workers)
    assert "train_" in message and "cannot be read: image file is truncated" in message


def test_a_class_count_that_contradicts_the_data_is_refused(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, tiny_config, "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    assert "80" in message and "3 classes (circle, square, triangle)" in message


def test_unusable_weights_are_refused(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "random" in refusal(capsys, tiny_config, "--eval-only")

    absent = ("MODEL.WEIGHTS", str(trained / "model_fnal.pth"))
    assert "model_final.pth'?" in refusal(capsys, tiny_config, "--eval-only", *absent)
    assert "do not exist" in refusal(capsys, tiny_config, *absent)

    noise = tmp_path / "noise.pth"
    noise.write_bytes(np.random.default_rng(0).bytes(1000))
    assert "cannot be loaded" in refusal(capsys, tiny_config, "MODEL.WEIGHTS", str(noise))
    assert "cannot be loaded" in refusal(
        capsys, tiny_config, "--eval-only", "MODEL.WEIGHTS", str(noise)
    )

    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    del checkpoint["model"]["roi_heads.mask_head.deconv.weight"]
    checkpoint["model"]["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    unfit = tmp_path / "unfit.pth"
    torch.save(checkpoint, unfit)
    message = refusal(capsys, tiny_config, "--eval-only", "MODEL.WEIGHTS", str(unfit))
    assert "parameters are missing: roi_heads.mask_head.deconv.weight" in message
    assert "roi_heads.box_predictor.cls_score.bias (9 in the file, 4 in the model)" in message

    foreign = tmp_path / "foreign.pth"
    torch.save({"model": {"layer.weight": torch.zeros(1)}}, foreign)
    assert "no parameter fits" in refusal(capsys, tiny_config, "MODEL.WEIGHTS", str(foreign))


def test_an_error_on_the_first_image_of_an_evaluation_is_one_line(
    trained: Path,
    tiny_config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("sizes differ")

    monkeypatch.setattr(GeneralizedRCNN, "preprocess_image", fail)
    weights = ("--eval-only", "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    message = refusal(capsys, tiny_config, *weights)
    for part in ("failed on", ".png", "sizes differ", "log.txt"):
        assert part in message


@pytest.mark.parametrize("method", ["process", "evaluate"])
def test_a_full_disk_in_evaluation_has_its_own_code(
    method: str,
    trained: Path,
    tiny_config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    monkeypatch.setattr(DatasetEvaluators, method, fail)
    assert run(tiny_config, "--eval-only", "MODEL.WEIGHTS", str(trained / "model_final.pth")) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "results.json" in line and "No space left" in line


def test_a_pkl_that_would_run_code_is_refused(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "witness"),)

    hostile = tmp_path / "hostile.pkl"
    hostile.write_bytes(pickle.dumps({"model": Hostile()}))
    assert "may run code" in refusal(capsys, tiny_config, "MODEL.WEIGHTS", str(hostile))
    assert not (tmp_path / "witness").exists()


def test_a_pkl_of_the_model_zoo_loads(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    arrays = {name: value.numpy() for name, value in model.items()}
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    assert run(tiny_config, "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "zoo.pkl")) == 0


def test_weights_of_other_classes_are_refused_in_evaluation(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    checkpoint["class_names"] = ["square", "circle", "triangle"]
    torch.save(checkpoint, tmp_path / "swapped.pth")
    message = refusal(
        capsys, tiny_config, "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "swapped.pth")
    )
    assert "classes differ" in message and "square, circle" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_gpu_is_refused(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cuda" in refusal(capsys, tiny_config, "MODEL.DEVICE", "cuda")
    assert "torchrun" in refusal(capsys, tiny_config, "--num-gpus", "2")


def test_an_unwritable_output_folder_is_refused(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A path below a file, since root may write into any folder.
    blocked = str(tmp_path / "file" / "output")
    (tmp_path / "file").touch()
    assert blocked in refusal(capsys, tiny_config, "OUTPUT_DIR", blocked)


def test_a_config_that_runs_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    witness = tmp_path / "witness"
    config = tmp_path / "hostile.yaml"
    config.write_text(f'SEED: !!python/object/apply:os.mkdir ["{witness}"]\n')
    assert "not plain YAML" in refusal(capsys, config)
    assert not witness.exists()


def test_an_interrupt_prints_no_traceback(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mask_rcnn_plus.engine.trainer.Trainer.train", interrupted)
    assert run(tiny_config) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.slow
def test_an_evaluation_resumes_from_an_intact_checkpoint_in_its_folder(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    shutil.copytree(trained, output)
    command = ("--eval-only", "--resume", "TEST.PREVIEW_IMAGES", "0")
    for pointer in (b"\xff\xfe", b"../../other/model.pth", b"", b"."):
        (output / "last_checkpoint").write_bytes(pointer)
        assert run(tiny_config, *command) == 0
        assert f"Resuming from {output}/model_final.pth" in capsys.readouterr().out
    final = output / "model_final.pth"
    final.write_bytes(final.read_bytes()[:-9])
    assert run(tiny_config, *command) == 2
    assert "model_final.pth is damaged" in capsys.readouterr().err
    final.with_name("model_final.pth.sha256").unlink()
    (output / "last_checkpoint").write_text("model_final.pth")
    torch.save({"model": {"w": torch.ones(1)}, "iteration": "x"}, final)
    assert run(tiny_config, *command) == 2


def test_names_in_files_cannot_control_the_terminal(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load(trained / "model_final.pth", weights_only=True)
    torch.save({**stored, "class_names": ["\x1b[2J\nerror", "a" * 900]}, tmp_path / "a.pth")
    assert run(tiny_config, "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "a.pth")) == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J error" in error and len(error) < 1000 and error.count("\n") == 1


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--nope"], ["--config-file"], ["--num-gpus", "x"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and arguments[0] in error
