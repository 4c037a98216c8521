"""Measures the CPU time that augmentations take, beside loading training images without them."""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from tqdm import tqdm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import build_train_batches, build_train_mapper, require_dataset
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, positive, run_command
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.loading"

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml DATASETS.TRAIN "('balloons_train',)"

Reading, augmenting and preparing an image and its objects, in one process; the rows take turns,
image by image, and CPU time hardly minds what else the machine does. The first row is the config
with no augmentation of this project; copy-paste is timed where every image gets objects, and costs
half as much with INPUT.COPY_PASTE.PROB 0.5. Loader workers (DATALOADER.NUM_WORKERS) do this beside
the training.
"""
_OFF = {
    "INPUT.JITTER.ENABLED": False,
    "INPUT.COLOR.BRIGHTNESS": 0.0,
    "INPUT.COLOR.CONTRAST": 0.0,
    "INPUT.COLOR.SATURATION": 0.0,
    "INPUT.COLOR.LIGHTING": 0.0,
    "INPUT.BLUR.PROB": 0.0,
    "INPUT.COPY_PASTE.PROB": 0.0,
}
_WARM_UPS = 2


def main(argv: Sequence[str]) -> int:
    """Times, and prints a Markdown table.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code, 0.

    Raises:
        UserError: an argument does not fit, or the data cannot be used.
    """
    arguments = _parse(argv)
    cfg = load_config(arguments.config_file, arguments.opts)
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, e.g. \"('mine_train',)\"")
    prepare_datasets(cfg)
    for name in cfg.DATASETS.TRAIN:
        require_dataset(name, training=True)
    times = measure(cfg, variants(cfg), images=arguments.images)
    print("; ".join(f"{name} {value}" for name, value in describe_environment("cpu").items()))
    print(f"{', '.join(cfg.DATASETS.TRAIN)}, {arguments.images} images a row\n")
    print("| augmentation | CPU ms an image | more than without |\n| --- | --- | --- |")
    base = next(iter(times.values()))
    for name, milliseconds in times.items():
        print(f"| {name} | {milliseconds:.1f} | {milliseconds - base:+.1f} |")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--images", type=positive, default=60, help="of each row (default: 60)")
    parser.add_overrides()
    return parser.parse_args(argv)


def variants(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """What each row changes in the config.

    Args:
        cfg: where it asks for jitter, its size is timed; else windows as high and wide as the
            middle one of INPUT.MIN_SIZE_TRAIN.
    """
    sides = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    side = max(1, sides[len(sides) // 2])
    size = tuple(cfg.INPUT.JITTER.SIZE) if cfg.INPUT.JITTER.ENABLED else (side, side)
    jitter = {"INPUT.JITTER.ENABLED": True, "INPUT.CROP.ENABLED": False, "INPUT.JITTER.SIZE": size}
    rows = {
        "none": {},
        f"jitter 0.1 to 2, {size[0]} x {size[1]}": {**jitter, "INPUT.JITTER.SCALE": (0.1, 2.0)},
        "brightness 0.4": {"INPUT.COLOR.BRIGHTNESS": 0.4},
        "contrast 0.4": {"INPUT.COLOR.CONTRAST": 0.4},
        "saturation 0.4": {"INPUT.COLOR.SATURATION": 0.4},
        "lighting 25.5": {"INPUT.COLOR.LIGHTING": 25.5},
        "blur, sigma 0.1 to 2": {"INPUT.BLUR.PROB": 1.0, "INPUT.BLUR.SIGMA": (0.1, 2.0)},
    }
    if cfg.MODEL.MASK_ON:
        # Of it, bitmaps instead of polygons are a part.
        rows["no augmentation, bitmap masks"] = {"INPUT.MASK_FORMAT": "bitmask"}
        rows["copy-paste"] = {"INPUT.COPY_PASTE.PROB": 1.0}
    return {name: {**_OFF, **changes} for name, changes in rows.items()}


def measure(cfg: CfgNode, rows: dict[str, dict[str, Any]], *, images: int) -> dict[str, float]:
    """Milliseconds of CPU time an image: the mean over images, the same ones for each row.

    Args:
        cfg: from ``load_config``; its data sets are registered.
        rows: name -> keys and values to change.
        images: how many of each row, after some to warm up.
    """
    loaders = {}
    for name, changes in rows.items():
        own = cfg.clone()
        own.merge_from_list([part for pair in changes.items() for part in pair])
        own.DATALOADER.NUM_WORKERS = 0
        own.SOLVER.IMS_PER_BATCH = 1
        batches = build_train_batches(own, build_train_mapper(own), seed=max(0, cfg.SEED))
        loaders[name] = iter(batches)
    times: dict[str, list[float]] = {name: [] for name in rows}
    hidden = not sys.stderr.isatty()
    for turn in tqdm(range(_WARM_UPS + images), unit="turn", disable=hidden):
        for name, loader in loaders.items():
            start = time.process_time()
            next(loader)
            if turn >= _WARM_UPS:
                times[name].append(1e3 * (time.process_time() - start))
    # Not the median: how much an augmentation costs, it draws; the slowest tenth is the machine's.
    return {name: statistics.mean(_without_slowest(values)) for name, values in times.items()}


def _without_slowest(values: list[float]) -> list[float]:
    return sorted(values)[: max(1, len(values) * 9 // 10)]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
