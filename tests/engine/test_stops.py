"""Several processes stop at the same step, save it once, and resume exactly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mask_rcnn_plus.engine.weights import non_finite
from tests.engine.test_resume import differing, load

ROOT = Path(__file__).parents[2]

# All runs share one pair of processes, since starting processes takes most of the time.
RUNS = """
import os, shutil, signal, sys
import mask_rcnn_plus
import torch
from detectron2.engine import HookBase, default_argument_parser
from detectron2.utils import comm
from mask_rcnn_plus.data.mapper import SafeDatasetMapper
from mask_rcnn_plus.engine import Trainer
from mask_rcnn_plus.engine.launch import _join_torchrun
from mask_rcnn_plus.engine.main import _run

torch.set_num_threads(1)
_join_torchrun("cpu")
config, folder = sys.argv[1:]
act = None

class Act(HookBase):
    def after_step(self):
        if act is not None:
            act(self.trainer)

build = Trainer.build_hooks
Trainer.build_hooks = lambda self: [*build(self), Act()]

def run(name, *options, doing=None):
    global act
    act = doing
    arguments = ["--config-file", config, *options, "OUTPUT_DIR", os.path.join(folder, name)]
    arguments += ["SOLVER.IMS_PER_BATCH", "4"]
    try:
        _run(default_argument_parser().parse_args(arguments))
        code = 0
    except SystemExit as end:
        code = end.code
    sys.stdout.write(f"CODE {name} {comm.get_rank()} {code}\\n")
    sys.stdout.flush()

def on_rank_1(at, do):
    def doing(trainer):
        if trainer.iter == at and comm.get_rank() == 1:
            do(trainer)
    return doing

def poison(trainer):
    # Only in this process, so that only its own losses can show it.
    with torch.no_grad():
        trainer.model.module.roi_heads.mask_head.deconv.bias.fill_(torch.inf)

def lose_images(trainer):
    # From now on, this process cannot read any image.
    SafeDatasetMapper.__call__ = lambda self, record: 1 / 0

run("whole")
run("cut", doing=on_rank_1(2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)))
run("cut", "--resume")
run("diverged", doing=on_rank_1(3, poison))
run("refused", doing=on_rank_1(4, lose_images))
"""


@pytest.mark.slow
def test_two_processes_stop_together(small_config: Path, tmp_path: Path) -> None:
    script = tmp_path / "runs.py"
    script.write_text(RUNS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(small_config), str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes = {tuple(line.split()[1:3]): line.split()[3] for line in _codes(done.stdout)}
    expected = {"whole": "0", "cut": "0", "diverged": "3", "refused": "2"}
    assert codes == {(name, rank): expected[name] for name in expected for rank in "01"}
    assert "CODE cut 0 143" in done.stdout and "CODE cut 1 143" in done.stdout

    assert differing(*[tmp_path / n / "model_final.pth" for n in ("whole", "cut")]) == []
    assert load(tmp_path / "cut" / "model_0000002.pth")["iteration"] == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "diverged at iteration 4" in errors[0] and "ZeroDivisionError" in errors[1]
    assert load(tmp_path / "refused" / "model_0000004.pth")["iteration"] == 4
    last = tmp_path / "diverged" / "model_0000003.pth"
    assert last.with_name("last_checkpoint").read_text() == last.name
    assert not list(non_finite(load(last)["model"]))
    stored = torch.load(tmp_path / "diverged" / "divergence.pt", weights_only=False)
    assert len(stored["batch"]) == 2


KILLED = """
import os, signal, sys
import mask_rcnn_plus
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from mask_rcnn_plus.engine import Trainer, main

torch.set_num_threads(1)

class Die(HookBase):
    def after_step(self):
        if self.trainer.iter == 3 and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

build = Trainer.build_hooks
Trainer.build_hooks = lambda self: [*build(self), Die()]
code = main(["--config-file", sys.argv[1], "SOLVER.IMS_PER_BATCH", "4"])
print(f"CODE {code}", flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_one_line(small_config: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(small_config)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    (errors,) = (tmp_path / "logs").rglob("0/stderr.log")
    lines = [line for line in errors.read_text().splitlines() if "SIGTERM" not in line and line]
    assert len(lines) == 1 and "another process of the run has ended" in lines[0]
    assert "Traceback" not in errors.with_name("stdout.log").read_text()
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_0000003.pth"


def _codes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("CODE ")]
