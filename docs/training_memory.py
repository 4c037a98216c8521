"""Prints the memory and the CPU time of a training, every 50 iterations (docs/performance.md).

    uv run docs/training_memory.py trim|keep|stock CONFIG [KEY VALUE ...]

"trim" trains as train_net.py does, "keep" without returning freed memory, "stock" with detectron2's
trainer, data loading and ROI heads (and this project's optimizer). Nothing is evaluated or saved.
"""

import sys
import time
from pathlib import Path

from mask_rcnn_plus.config import with_values
from mask_rcnn_plus.engine import Trainer, setup
from mask_rcnn_plus.engine.arguments import parse
from mask_rcnn_plus.engine.memory import FreedMemory

from detectron2.engine import DefaultTrainer, HookBase  # isort: skip  # after its repairs


class Stock(DefaultTrainer):
    build_optimizer = Trainer.build_optimizer


class Measure(HookBase):
    def after_step(self) -> None:
        if (done := self.trainer.iter + 1) % 50 == 0:
            status = Path("/proc/self/status").read_text().split()
            rss, peak = (int(status[status.index(k) + 1]) // 1024 for k in ("VmRSS:", "VmHWM:"))
            print(f"{done},{rss},{peak},{time.process_time():.1f}", flush=True)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak


side, config, *options = sys.argv[1:]
cfg = setup(parse(["--config-file", config, "DATA_CHECK", "off", *options]))
if side == "stock":
    heads = {"MODEL.ROI_HEADS.NAME": "StandardROIHeads", "MODEL.DEVICE": "cpu"}
    trainer = Stock(with_values(cfg, heads))
else:
    trainer = Trainer(cfg)
names = ["IterationTimer", "LRScheduler", "PeriodicWriter"] + ["FreedMemory"] * (side == "trim")
trainer._hooks = [hook for hook in trainer._hooks if type(hook).__name__ in names]
assert any(isinstance(hook, FreedMemory) for hook in trainer._hooks) == (side == "trim")
trainer.register_hooks([Measure()])
trainer.resume_or_load(resume=False)
print("iterations,resident MiB,peak MiB of the last 50,CPU seconds")
trainer.train()
