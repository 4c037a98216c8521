"""A run with a model so small that saving it repeatedly takes almost no time."""

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY

SMALL = copy.deepcopy(TINY)
# ResNet-18 cannot be made narrower; this ResNet-50 has 0.4 million parameters.
SMALL["MODEL"]["RESNETS"] = {
    **TINY["MODEL"]["RESNETS"],
    "DEPTH": 50,
    "RES2_OUT_CHANNELS": 8,
    "STEM_OUT_CHANNELS": 4,
    "WIDTH_PER_GROUP": 4,
}
SMALL["MODEL"]["ROI_HEADS"]["BATCH_SIZE_PER_IMAGE"] = 8
SMALL["INPUT"]["MIN_SIZE_TRAIN"] = [32, 40]
# A large learning rate, so that any difference between two runs grows.
SMALL["SOLVER"].update(BASE_LR=0.01, MAX_ITER=7, CHECKPOINT_PERIOD=2)
SMALL["DATASETS"]["TEST"] = []
SMALL["TEST"] = {"PREVIEW_IMAGES": 0}


@pytest.fixture
def small_config(tmp_path: Path, shapes: Path) -> Path:
    """A config file with 7 iterations, a checkpoint every 2, and no evaluation."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "OUTPUT_DIR": str(tmp_path / "output")}))
    return path


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 9 MiB in memory."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
