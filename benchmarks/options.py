"""Times training steps with one training option each, beside steps without any."""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.engine import Trainer
from mask_rcnn_plus.engine.validation import build_validation
from mask_rcnn_tools.arguments import Parser, positive, run_command
from mask_rcnn_tools.config_run import prepare_training
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.options"

_BOX = "MODEL.ROI_BOX_HEAD"
# The option's name in the table -> what turns it on.
OPTIONS = {
    "baseline": [],
    "SOLVER.EMA": ["SOLVER.EMA.ENABLED", "True"],
    "SOLVER.ACCUMULATE_STEPS 2": ["SOLVER.ACCUMULATE_STEPS", "2"],
    "SOLVER.ACCUMULATE_STEPS 2, EXACT False": [
        *("SOLVER.ACCUMULATE_STEPS", "2"),
        *("SOLVER.ACCUMULATE_EXACT", "False"),
    ],
    "SOLVER.OPTIMIZER SGD": ["SOLVER.OPTIMIZER", "SGD"],
    "SOLVER.OPTIMIZER ADAMW": ["SOLVER.OPTIMIZER", "ADAMW"],
    "SOLVER.FUSED": ["SOLVER.FUSED", "True"],
    "SOLVER.AMP, DTYPE bf16": ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bf16"],
    "MODEL.FREEZE stem, res2": [
        "MODEL.FREEZE",
        "['backbone.bottom_up.stem', 'backbone.bottom_up.res2']",
    ],
    "MODEL.FREEZE backbone": ["MODEL.FREEZE", "['backbone']"],
    f"{_BOX}.LOSS_CLS focal": [f"{_BOX}.LOSS_CLS", "focal"],
    f"{_BOX}.CLASS_WEIGHTING": [f"{_BOX}.CLASS_WEIGHTING", "inverse_frequency"],
}

_EPILOG = f"""
Example: {PROGRAM} --config-file configs/ablations/training/baseline.yaml

Every side trains a model of its own on the same images from the same seed. A round gives each side
its steps in turn; what is printed is the median over rounds of the time beside the baseline's in
the same round, and how many training images one image of TEST.LOSS_PERIOD takes the time of. On
the CPU it is the process's CPU time, which other processes hardly change.
"""


def main(argv: Sequence[str]) -> int:
    """Times the options, and prints their table.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code, 0.

    Raises:
        UserError: an argument, the config or the data is wrong.
    """
    arguments = _parse(argv)
    # Else DefaultTrainer would have every model printed. Warnings are, by Python.
    logging.getLogger("detectron2").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = {
            name: _side(arguments, keys, Path(folder, str(number)), stack)
            for number, (name, keys) in enumerate(OPTIONS.items())
        }
        device = sides["baseline"].device
        times = _alternate(sides, arguments)
        image = sides["baseline"].time_of_a_loss(arguments.rounds)
    print(_table(times))
    baseline = statistics.median(times["baseline"]) / sides["baseline"].batch
    print(f"\nTEST.LOSS_PERIOD: an image takes {image / baseline:.2f} of a training image's time\n")
    facts = describe_environment(device)
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    return 0


class _Side:
    """A run that does steps, with the hooks that go with them, when it is asked to."""

    def __init__(self, cfg: CfgNode, stack: ExitStack) -> None:
        seed_all_rng(max(cfg.SEED, 0))
        self._trainer = Trainer(cfg)
        self._trainer.resume_or_load(resume=False)
        self._trainer.storage = stack.enter_context(EventStorage())
        self._trainer.before_train()
        self.device = str(next(self._trainer.model.parameters()).device)
        self.batch = cfg.SOLVER.IMS_PER_BATCH

    def step(self) -> None:
        """One iteration of the run."""
        trainer = self._trainer
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()
        trainer.iter += 1

    def time_of_a_loss(self, rounds: int) -> float:
        """The median seconds that ValidationLoss takes for an image of the test sets."""
        validation = build_validation(self._trainer.cfg)
        times = []
        for _ in range(rounds):
            start = _clock(self.device)
            validation.measure(self._trainer.model)
            times.append(_clock(self.device) - start)
        sets = len(self._trainer.cfg.DATASETS.TEST)
        return statistics.median(times) / (sets * self._trainer.cfg.TEST.LOSS_IMAGES)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--rounds", type=positive, default=30, help="default: 30")
    parser.add_argument("--steps", type=positive, default=1, help="of a round; default: 1")
    parser.add_overrides()
    return parser.parse_args(argv)


def _side(arguments: argparse.Namespace, keys: list[str], folder: Path, stack: ExitStack) -> _Side:
    cfg = load_config(arguments.config_file, [*arguments.opts, *keys])
    cfg.OUTPUT_DIR = str(folder)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 10**6  # nothing is saved
    cfg.TEST.EVAL_PERIOD = 0
    cfg.TEST.LOSS_IMAGES = 2
    cfg.SEED = max(cfg.SEED, 0)
    folder.mkdir()
    tests = cfg.DATASETS.TEST
    prepare_training(cfg)
    cfg.defrost()
    cfg.DATASETS.TEST = tests
    cfg.freeze()
    return _Side(cfg, stack)


def _alternate(sides: dict[str, _Side], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of a step of each side in each round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(range(1 + arguments.rounds), desc="Rounds"):
        # Another side first each round: the first is the one to read the images from the disk.
        first = turn % len(sides)
        for name, side in [*sides.items()][first:] + [*sides.items()][:first]:
            start = _clock(side.device)
            for _ in range(arguments.steps):
                side.step()
            if turn:
                times[name].append((_clock(side.device) - start) / arguments.steps)
    return times


def _clock(device: str) -> float:
    """Seconds: of a GPU's work, or of this process on the CPUs, whatever else runs there."""
    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _table(times: dict[str, list[float]]) -> str:
    lines = ["| option | ms a step | beside the baseline |", "| --- | --- | --- |"]
    for name, seconds in times.items():
        pairs = zip(seconds, times["baseline"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.0f} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
