"""Training in torch's deterministic mode: two runs give the same weights, bit for bit."""

from pathlib import Path

import pytest
import torch

from mask_rcnn_plus.engine import main
from tests.memory import linux_only, run_alone


def train(config: Path, output: Path) -> dict[str, torch.Tensor]:
    arguments = ["OUTPUT_DIR", str(output), "TEST.PREVIEW_IMAGES", "0", "DATASETS.TEST", "()"]
    arguments += ["MODEL.ROI_HEADS.NAME", "FusedROIHeads", "SOLVER.MAX_ITER", "6"]
    # A large learning rate, so that any difference between two runs grows.
    arguments += ["SOLVER.BASE_LR", "0.01"]
    assert main(["--config-file", str(config), *arguments]) == 0
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


@pytest.mark.slow
def test_two_runs_of_one_seed_give_the_same_weights(
    tiny_config: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (train(tiny_config, tmp_path / name) for name in ("first", "second"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert not [w for w in recwarn if "determinis" in str(w.message)]


WATCHED = """
import sys, torch, mask_rcnn_plus
from detectron2.engine import HookBase
from mask_rcnn_plus.engine import Trainer, main
from tests.memory import forget_peak, resident

peaks = []

class Watch(HookBase):
    def after_step(self):
        if self.trainer.iter in (4, self.trainer.max_iter - 1):
            peaks.append(resident("VmHWM"))
            forget_peak()

hooks = Trainer.build_hooks
Trainer.build_hooks = lambda self: [*hooks(self), Watch()]
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
code = main(sys.argv[1:])
print("peaks", *peaks)
sys.exit(code)
"""


@pytest.mark.slow
@linux_only
def test_training_does_not_use_more_and_more_memory(tiny_config: Path, tmp_path: Path) -> None:
    arguments = ["OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.TEST", "()"]
    arguments += ["MODEL.ROI_HEADS.NAME", "FusedROIHeads", "SOLVER.MAX_ITER", "25"]
    printed = run_alone(WATCHED, "--config-file", str(tiny_config), *arguments)
    first, later = map(float, printed.splitlines()[-1].split()[1:])
    # Some noise; keeping 20 graphs or gradients would take far more.
    assert later < first + 20
