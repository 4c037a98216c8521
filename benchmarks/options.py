"""Times training steps with one training option at a time, compared with steps without any."""

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from benchmarks.harness import add_arguments, alternate, clock, facts, markdown_table
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
example:
  {PROGRAM} --config-file configs/ablations/training/baseline.yaml

Each option trains its own model on the same images from the same seed. In each round the options
take turns, each with --steps steps. The ratio is the median over rounds of the time divided by the
baseline's in the same round. The last line compares the time per image of TEST.LOSS_PERIOD with
that of training. On the CPU, times are the process's CPU time, which other processes hardly change.
"""


def main(argv: Sequence[str]) -> int:
    """Times the options and prints their table."""
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--rounds", type=positive, default=30, help="default: 30")
    parser.add_argument("--steps", type=positive, default=1, help="per round (default: 1)")
    add_arguments(parser, "--config-file", "opts")
    arguments = parser.parse_intermixed_args(argv)
    # Otherwise DefaultTrainer prints every model. Warnings are still shown.
    logging.getLogger("detectron2").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = {
            name: _build_trainer(_config(arguments, keys, Path(folder, str(number))), stack)
            for number, (name, keys) in enumerate(OPTIONS.items())
        }
        baseline = trainers["baseline"]
        device = str(next(baseline.model.parameters()).device)
        times = alternate(
            {name: partial(_step_time, t, device, arguments.steps) for name, t in trainers.items()},
            turns=arguments.rounds,
            # The first trainer of a round reads the images from the disk.
            rotate=True,
            label="rounds",
        )
        loss_ms = _loss_time(baseline, device, arguments.rounds)
    rows = []
    for name, milliseconds in times.items():
        ratios = [a / b for a, b in zip(milliseconds, times["baseline"], strict=True)]
        median = statistics.median(milliseconds)
        rows.append([name, f"{median:.0f}", f"{statistics.median(ratios):.2f}"])
    print("\n".join(markdown_table(["option", "ms per step", "ratio to the baseline"], rows)))
    image_ms = statistics.median(times["baseline"]) / baseline.cfg.SOLVER.IMS_PER_BATCH
    print(
        f"\nTEST.LOSS_PERIOD: an image takes {loss_ms / image_ms:.2f} times as long as in training"
    )
    print(f"\n{facts(describe_environment(device))}")
    return 0


def _config(arguments: argparse.Namespace, keys: list[str], folder: Path) -> CfgNode:
    cfg = load_config(arguments.config_file, [*arguments.opts, *keys])
    cfg.OUTPUT_DIR = str(folder)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 10**6  # nothing is saved
    cfg.TEST.EVAL_PERIOD = 0
    cfg.TEST.LOSS_IMAGES = 2
    cfg.SEED = max(cfg.SEED, 0)
    folder.mkdir()
    tests = cfg.DATASETS.TEST
    prepare_training(cfg)
    # prepare_training removes the test sets; the loss on them is timed here.
    cfg.defrost()
    cfg.DATASETS.TEST = tests
    cfg.freeze()
    return cfg


def _build_trainer(cfg: CfgNode, stack: ExitStack) -> Trainer:
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.storage = stack.enter_context(EventStorage())
    trainer.before_train()
    return trainer


def _step_time(trainer: Trainer, device: str, steps: int, turn: int) -> float:
    """The mean milliseconds of some steps, with their hooks."""
    start = clock(device, cpu_time=True)
    for _ in range(steps):
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()
        trainer.iter += 1
    return (clock(device, cpu_time=True) - start) / steps


def _loss_time(trainer: Trainer, device: str, rounds: int) -> float:
    """The median milliseconds of the validation loss per image of the test sets."""
    validation = build_validation(trainer.cfg)
    times = []
    for _ in range(rounds):
        start = clock(device, cpu_time=True)
        validation.measure(trainer.model)
        times.append(clock(device, cpu_time=True) - start)
    images = len(trainer.cfg.DATASETS.TEST) * trainer.cfg.TEST.LOSS_IMAGES
    return statistics.median(times) / images


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
