"""Measures the CPU time of augmentations, compared with loading training images without them."""

import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from benchmarks.harness import add_arguments, alternate, clock, facts, markdown_table
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import build_train_batches, build_train_mapper
from mask_rcnn_plus.data.augmentation import jitter_size
from mask_rcnn_tools.arguments import Parser, positive, run_command
from mask_rcnn_tools.config_run import training_records
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.loading"

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml DATASETS.TRAIN "('balloons_train',)"

Times reading, augmenting and preparing an image and its objects, in one process. The rows alternate
image by image; other processes hardly change CPU time. The first row is the config without any
augmentation of this project. Copy-paste is timed with objects pasted into every image; with
INPUT.COPY_PASTE.PROB 0.5 it costs half as much. In training, loader workers
(DATALOADER.NUM_WORKERS) do this while the model trains.
"""
_COLORS = ("BRIGHTNESS", "CONTRAST", "SATURATION", "LIGHTING")
_OFF = {
    "INPUT.JITTER.ENABLED": False,
    **{f"INPUT.COLOR.{name}": 0.0 for name in _COLORS},
    "INPUT.BLUR.PROB": 0.0,
    "INPUT.COPY_PASTE.PROB": 0.0,
}
_WARM_UPS = 2


def main(argv: Sequence[str]) -> int:
    """Times the augmentations and prints a Markdown table."""
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--images", type=positive, default=60, help="per row (default: 60)")
    add_arguments(parser, "--config-file", "opts")
    arguments = parser.parse_intermixed_args(argv)
    cfg = load_config(arguments.config_file, arguments.opts)
    training_records(cfg)  # registers the data sets and checks them
    times = measure(cfg, variants(cfg), images=arguments.images)
    print(facts(describe_environment("cpu")))
    print(f"{', '.join(cfg.DATASETS.TRAIN)}, {arguments.images} images per row\n")
    base = next(iter(times.values()))
    rows = [[name, f"{ms:.1f}", f"{ms - base:+.1f}"] for name, ms in times.items()]
    head = ["augmentation", "CPU ms per image", "more than without"]
    print("\n".join(markdown_table(head, rows)))
    return 0


def variants(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """The rows' names and the config keys that each changes.

    Jitter is timed at the config's size if the config uses it, otherwise with square windows of
    the middle size of INPUT.MIN_SIZE_TRAIN.
    """
    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    middle = max(1, sizes[len(sizes) // 2])
    size = jitter_size(cfg) if cfg.INPUT.JITTER.ENABLED else (middle, middle)
    jitter = {"INPUT.JITTER.ENABLED": True, "INPUT.CROP.ENABLED": False, "INPUT.JITTER.SIZE": size}
    rows: dict[str, dict[str, Any]] = {
        "none": {},
        f"jitter 0.1 to 2, {size[0]} x {size[1]}": {**jitter, "INPUT.JITTER.SCALE": (0.1, 2.0)},
        **{f"{name.lower()} 0.4": {f"INPUT.COLOR.{name}": 0.4} for name in _COLORS[:3]},
        "lighting 25.5": {"INPUT.COLOR.LIGHTING": 25.5},
        "blur, sigma 0.1 to 2": {"INPUT.BLUR.PROB": 1.0, "INPUT.BLUR.SIGMA": (0.1, 2.0)},
    }
    if cfg.MODEL.MASK_ON:
        # Copy-paste needs bitmaps; the first of these rows shows the cost of bitmaps.
        rows["no augmentation, bitmap masks"] = {"INPUT.MASK_FORMAT": "bitmask"}
        rows["copy-paste"] = {"INPUT.COPY_PASTE.PROB": 1.0}
    return {name: {**_OFF, **changes} for name, changes in rows.items()}


def measure(cfg: CfgNode, rows: dict[str, dict[str, Any]], *, images: int) -> dict[str, float]:
    """Mean CPU time per image in milliseconds, without the slowest tenth.

    Args:
        cfg: from ``load_config``; its data sets are registered.
        rows: name -> config keys and values to change. All rows load the same images.
        images: the number of images per row, after the warm-up.
    """

    def load(batches: Iterator[Any], turn: int) -> float:
        start = clock("cpu", cpu_time=True)
        next(batches)
        return clock("cpu", cpu_time=True) - start

    runs = {}
    for name, changes in rows.items():
        own = cfg.clone()
        own.merge_from_list([part for pair in changes.items() for part in pair])
        own.DATALOADER.NUM_WORKERS = 0
        own.SOLVER.IMS_PER_BATCH = 1
        batches = build_train_batches(own, build_train_mapper(own), seed=max(0, cfg.SEED))
        runs[name] = partial(load, iter(batches))
    times = alternate(runs, turns=images, warm_ups=_WARM_UPS, label="images")
    # The machine causes the slowest tenth. The median is not suitable, since the cost of an
    # augmentation depends on its random values.
    kept = max(1, images * 9 // 10)
    return {name: statistics.mean(sorted(values)[:kept]) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
