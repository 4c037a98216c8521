"""Measures AP against CPU time, and draws docs/images/finetune.png.

uv run python docs/finetune_curve.py run CURVE.json ARGUMENTS...   trains as train_net.py ARGUMENTS
uv run --with matplotlib python docs/finetune_curve.py draw PLOT.png "LABEL=CURVE.json,..." ...

The time is that of the process and its loader workers during the training, without evaluations.
"""

import json
import os
import resource
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any


def run(file: Path, arguments: list[str]) -> int:
    """Trains, and saves the CPU minutes and the AP of each evaluation."""
    from mask_rcnn_plus.engine import main
    from mask_rcnn_plus.engine.trainer import Trainer

    train, test = Trainer.train, Trainer.test.__func__
    points: list[dict[str, float]] = []
    skipped = 0.0  # seconds before the training and in evaluations

    def timed_train(self: Any) -> Any:
        nonlocal skipped
        skipped = _cpu_seconds()
        return train(self)

    def timed_test(cls: type, *args: Any, **kwargs: Any) -> Any:
        nonlocal skipped
        start = _cpu_seconds()
        results = test(cls, *args, **kwargs)
        aps = {f"{kind}/{m}": results[kind][m] for kind in results for m in ("AP", "AP50")}
        points.append({"minutes": (start - skipped) / 60, **aps})
        file.write_text(json.dumps(points, indent=1))
        skipped += _cpu_seconds() - start
        return results

    Trainer.train, Trainer.test = timed_train, classmethod(timed_test)
    return main(arguments)


def _cpu_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for worker in active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def draw(plot: Path, curves: list[str]) -> int:
    """Draws mask AP against minutes; curves of one label are seeds and have one colour."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for color, curve in zip(("tab:blue", "tab:orange", "tab:green"), curves, strict=False):
        label, _, files = curve.rpartition("=")
        for number, file in enumerate(files.split(",")):
            points = json.loads(Path(file).read_text())
            x, y = ([0.0, *(p[key] for p in points)] for key in ("minutes", "segm/AP"))
            axes.plot(x, y, "o-", color=color, markersize=3, label=None if number else label)
    axes.set(xlabel="CPU minutes of training", ylabel="mask AP", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(plot, dpi=150)
    return 0


if __name__ == "__main__":
    command, target, *rest = sys.argv[1:]
    sys.exit({"run": run, "draw": draw}[command](Path(target), rest))
