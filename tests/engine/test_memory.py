"""The memory of a training process does not grow."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from mask_rcnn_plus.engine import memory
from mask_rcnn_plus.engine.memory import FreedMemory
from tests.memory import ROOT, linux_only, resident


def hook_at(iteration: int, storage: EventStorage) -> FreedMemory:
    hook = FreedMemory()
    hook.trainer = SimpleNamespace(iter=iteration, storage=storage)
    return hook


@linux_only
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_returns_to_the_operating_system() -> None:
    blocks = [bytearray(60_000) for _ in range(2_000)]
    last = blocks[-1]  # glibc returns only what is free at the end of the heap
    blocks.clear()
    before = resident()
    hook_at(18, EventStorage()).after_step()
    kept = resident()
    hook_at(19, EventStorage()).after_step()
    assert before - kept < 10
    assert kept - resident() > 80
    assert len(last) == 60_000


def test_only_the_newest_values_of_a_metric_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_VALUES", 50)
    with EventStorage() as storage:
        for iteration in range(100):
            storage.iter = iteration
            storage.put_scalar("total_loss", iteration)
            hook_at(iteration, storage).after_step()
    history = storage.history("total_loss")
    assert [value for value, _ in history.values()] == list(range(50, 100))
    assert history.global_avg() == pytest.approx(49.5)


@linux_only
@pytest.mark.slow
def test_a_training_does_not_grow(small_config: Path) -> None:
    script = """
import sys
from mask_rcnn_plus.engine import Trainer, setup  # first, because it repairs detectron2
from detectron2.engine.hooks import CallbackHook
from mask_rcnn_plus.engine.arguments import parse
from tests.memory import resident

sizes = []
def measure(trainer):
    if trainer.iter % 20 == 19:
        sizes.append(resident())

options = ["SOLVER.MAX_ITER", "400", "SOLVER.CHECKPOINT_PERIOD", "1000", "DATA_CHECK", "off"]
options += ["SOLVER.BASE_LR", "0.0001"]
trainer = Trainer(setup(parse(["--config-file", sys.argv[1], *options])))
trainer.register_hooks([CallbackHook(after_step=measure)])
trainer.resume_or_load(resume=False)
trainer.train()
print("sizes", *sizes)
"""
    # Not run_alone(), which makes glibc itself return memory.
    command = [sys.executable, "-W", "ignore", "-c", script, str(small_config)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    (line,) = [x for x in output.splitlines() if x.startswith("sizes")]
    sizes = list(map(float, line.split()[1:]))
    assert len(sizes) == 20
    # The first half fills caches, such as those of oneDNN for each shape.
    assert max(sizes[15:]) < 1.03 * max(sizes[5:10]), sizes
