"""A data set and a model that are so small that a whole run takes seconds."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_plus.data import generate_shapes, register_folder_datasets
from mask_rcnn_plus.engine import main

# A complete Mask R-CNN, so small that a test can train it.
TINY = {
    "VERSION": 2,
    "MODEL": {
        "DEVICE": "cpu",
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "MASK_ON": True,
        "WEIGHTS": "",
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 18,
            "RES2_OUT_CHANNELS": 64,
            "STEM_OUT_CHANNELS": 64,
            "NORM": "BN",
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]]},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "PRE_NMS_TOPK_TRAIN": 100,
            "PRE_NMS_TOPK_TEST": 50,
            "POST_NMS_TOPK_TRAIN": 50,
            "POST_NMS_TOPK_TEST": 20,
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "NUM_CLASSES": -1,
            "BATCH_SIZE_PER_IMAGE": 16,
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead",
            "NUM_FC": 1,
            "FC_DIM": 16,
            "POOLER_RESOLUTION": 7,
        },
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "NUM_CONV": 1,
            "CONV_DIM": 8,
            "POOLER_RESOLUTION": 14,
        },
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
    "DATASETS": {"TRAIN": ["shapes_train"], "TEST": ["shapes_val"]},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {
        "MAX_ITER": 2,
        "IMS_PER_BATCH": 2,
        "BASE_LR": 0.001,
        "WARMUP_ITERS": 0,
        "CHECKPOINT_PERIOD": 1000,
    },
    "SEED": 1,
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Threads do not speed up maps this small; on a busy machine they wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data check uses a cache of its own instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASK_RCNN_PLUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _not_started_by_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed commands are the same under ``uv run pytest`` and ``pytest``."""
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)


@pytest.fixture(autouse=True)
def _remove_handlers() -> Iterator[None]:
    """Removes the handlers of a test, since pytest closes their streams."""
    yield
    for name in ("detectron2", "fvcore", "mask_rcnn_plus"):
        logging.getLogger(name).handlers.clear()


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set root with shapes_train and shapes_val: a few images of 64 x 64 pixels."""
    root = tmp_path_factory.mktemp("datasets")
    generate_shapes(root, num_train=4, num_val=3, image_size=(64, 64), progress=False)
    return root


@pytest.fixture
def shapes(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, as the data set root of the running test."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_root))
    register_folder_datasets()
    return shapes_root


@pytest.fixture
def tiny_config(tmp_path: Path, shapes: Path) -> Path:
    """A config file of a tiny Mask R-CNN on the tiny shapes, with output in the test's folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "OUTPUT_DIR": str(tmp_path / "output")}))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """The output folder of one tiny training run of 2 iterations."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "OUTPUT_DIR": str(folder / "output")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes_root))
        assert main(["--config-file", str(config)]) == 0
    return folder / "output"
