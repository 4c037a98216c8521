"""Two CPU processes under torchrun give the results of one process."""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine import main
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]

# With the same picture everywhere in the batch, no augmentation, normalization that is independent
# of the batch, and every candidate sampled, two processes with one image each have the gradient of
# one process with two images.
SAME_GRADIENT = {
    **TINY,
    "INPUT": {**TINY["INPUT"], "RANDOM_FLIP": "none"},
    "SOLVER": {**TINY["SOLVER"], "MAX_ITER": 3, "BASE_LR": 0.01},
    "TEST": {"PREVIEW_IMAGES": 0},
}
SAME_GRADIENT["MODEL"] = {
    **TINY["MODEL"],
    "RESNETS": {**TINY["MODEL"]["RESNETS"], "NORM": "GN"},
    "RPN": {**TINY["MODEL"]["RPN"], "BATCH_SIZE_PER_IMAGE": 10**6, "POSITIVE_FRACTION": 1.0},
    "ROI_HEADS": {
        **TINY["MODEL"]["ROI_HEADS"],
        "BATCH_SIZE_PER_IMAGE": 10**6,
        "POSITIVE_FRACTION": 1.0,
    },
}


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(
    tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(shapes_root / "shapes", folder)
    coco = json.loads((folder / "train.json").read_text())
    first = coco["images"][0]
    for image in coco["images"]:
        image["file_name"] = first["file_name"]
    own = [a for a in coco["annotations"] if a["image_id"] == first["id"]]
    copies = [{**a, "image_id": image["id"]} for image in coco["images"] for a in own]
    coco["annotations"] = [{**a, "id": i} for i, a in enumerate(copies, 1)]
    (folder / "train.json").write_text(json.dumps(coco))

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(SAME_GRADIENT))
    two, one, again = (tmp_path / name for name in ("two", "one", "again"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [str(ROOT / "train_net.py"), "--config-file", str(config), "OUTPUT_DIR", str(two)]
    subprocess.run(
        [sys.executable, *torchrun, *command],
        check=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert main(["--config-file", str(config), "OUTPUT_DIR", str(one)]) == 0

    weights = {
        folder: torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (one, two)
    }
    for name, value in weights[one].items():
        torch.testing.assert_close(weights[two][name], value, rtol=1e-3, atol=1e-5, msg=name)

    # Each process evaluated its share of the images; together they equal one process.
    arguments = ["--eval-only", "MODEL.WEIGHTS", str(two / "model_final.pth")]
    assert main(["--config-file", str(config), *arguments, "OUTPUT_DIR", str(again)]) == 0
    results = {
        folder: json.loads((folder / "inference/shapes_val/metrics.json").read_text())
        for folder in (two, again)
    }
    assert results[two]["speed"]["processes"] == 2
    for task in ("bbox", "segm"):
        assert results[two][task] == pytest.approx(results[again][task], nan_ok=True, abs=1e-3)
    detections = [read_detections(folder) for folder in (two, again)]
    assert len(detections[0]) == len(detections[1]) > 10
    np.testing.assert_allclose(*detections, rtol=1e-3, atol=1e-3)


def read_detections(run: Path) -> np.ndarray:
    """Image id, category, score and box of every detection, sorted."""
    detections = json.loads((run / "inference/shapes_val/coco_instances_results.json").read_text())
    rows = [[d["image_id"], d["category_id"], d["score"], *d["bbox"]] for d in detections]
    return np.array(sorted(rows))


def test_each_process_reports_its_images_and_one_per_machine_other_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("mask_rcnn_plus.engine.main")
    monkeypatch.setattr(module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.comm, "get_local_rank", lambda: 1)

    class Trainer:
        def __init__(self, cfg: object) -> None:
            self.checkpointer = argparse.Namespace()

        def resume_or_load(self, resume: bool) -> None: ...

        def train(self) -> None:
            raise UserError("image 7 is broken")

    def refuse(args: object, check_data: object) -> None:
        raise UserError("no such data set")

    arguments = argparse.Namespace(eval_only=False, resume=False, trust_checkpoint=False)
    monkeypatch.setattr(module, "Trainer", Trainer)
    for setup, printed in (
        (lambda args, check_data: None, "error: image 7 is broken\n"),
        (refuse, ""),
    ):
        monkeypatch.setattr(module, "setup", setup)
        with pytest.raises(SystemExit) as end:
            module._run(arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err == printed


@pytest.mark.parametrize(("backend", "count"), [("nccl", 0), ("gloo", 1)])
def test_a_process_that_fails_does_not_wait_for_the_others_with_nccl(
    backend: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Destroying the group waits for all processes, and they may wait for gradients of this one.
    launch = importlib.import_module("mask_rcnn_plus.engine.launch")
    destroyed: list[int] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_join_torchrun", lambda device: None)
    monkeypatch.setattr(launch.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(launch.dist, "destroy_process_group", lambda: destroyed.append(1))
    arguments = argparse.Namespace()

    def fails(args: argparse.Namespace) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        launch.launch(fails, arguments, "cuda")
    assert len(destroyed) == count
    launch.launch(lambda args: None, arguments, "cuda")
    assert len(destroyed) == count + 1
