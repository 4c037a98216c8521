"""Finds anchors that cover a data set's boxes, at the sizes at which a config trains on them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.modeling import build_anchor_generator, build_backbone
from tqdm import tqdm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import require_dataset
from mask_rcnn_plus.data.anchors import Anchors, SeenBoxes, coverage, fit, seen_boxes
from mask_rcnn_plus.data.augmentation import build_augmentations
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, require_new

PROGRAM = "mask-rcnn-plus fit-anchors"

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml balloons_train --output anchors.yaml

Boxes are taken after the config's resizing, cropping and jitter, each image augmented several times
where there are few. Recall is the share of boxes that some anchor, at its places on its feature
map, overlaps with an IoU of at least 0.5 or 0.7: from 0.7 on the RPN calls an anchor positive for
its IoU alone. As many anchors as now are sought, on the same maps, so that weights still fit; the
line "at test size" says how the same boxes are covered after the test's resizing.
"""
# Beyond so many boxes an estimate of the recall gets hardly better.
_ENOUGH = 10_000
_MOST_DRAWS = 20


def main(argv: Sequence[str]) -> int:
    """Fits, prints the recall before and after, and the lines to put into a config.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code, 0.

    Raises:
        UserError: an argument does not fit, or the data cannot be used.
    """
    arguments = _parse(argv)
    output: Path | None = arguments.output
    if output is not None:
        require_new(output, overwrite=arguments.overwrite)
    cfg = load_config(arguments.config_file)
    names = arguments.names or list(cfg.DATASETS.TRAIN)
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name a data set after the options")
    now = config_anchors(cfg)
    prepare_datasets(cfg)
    records = [record for name in names for record in require_dataset(name, training=True)]
    training = _boxes(cfg, records, train=True)
    if not len(training):
        raise UserError(f"data set {', '.join(names)} has no boxes to fit anchors to")
    with _bar("fitting", "trial") as bar:
        fitted = fit(training, now, tick=bar.update)
    test = _boxes(cfg, records, train=False)
    text = _yaml(fitted)
    print(_table(names, training, test, now, fitted))
    if fitted == now:
        print("\nNothing better was found: the config's anchors may stay.")
    print(f"\n{text}", end="")
    if output is not None:
        try:
            output.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        print(f"written: {output}", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="instead of DATASETS.TRAIN")
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--output", type=Path, metavar="OUT.yaml", help="write the lines there")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.yaml")
    return parser.parse_args(argv)


def config_anchors(cfg: CfgNode) -> Anchors:
    """The anchors of a config's RPN.

    Raises:
        UserError: the config has no such anchors, or other numbers of them on each map.
    """
    generator = cfg.MODEL.ANCHOR_GENERATOR
    if generator.NAME != "DefaultAnchorGenerator":
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.NAME is '{generator.NAME}', whose anchors are not "
            "those of DefaultAnchorGenerator: there is nothing to fit"
        )
    alone = cfg.clone()
    alone.MODEL.DEVICE = "cpu"
    alone.MODEL.TIMM.PRETRAINED = False
    maps = build_backbone(alone).output_shape()
    missing = [name for name in cfg.MODEL.RPN.IN_FEATURES if name not in maps]
    if missing:
        raise UserError(
            f"MODEL.RPN.IN_FEATURES names '{missing[0]}'; the backbone has {', '.join(maps)}"
        )
    shapes = [maps[name] for name in cfg.MODEL.RPN.IN_FEATURES]
    levels = len(shapes)
    try:
        build_anchor_generator(alone, shapes)
    except AssertionError as error:
        raise UserError(
            "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS must be lists of one list, or of "
            f"{levels}, one for each of MODEL.RPN.IN_FEATURES"
        ) from error

    def each(values: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
        """What detectron2 makes of one list for all maps, or of a list of one list."""
        lists = values if isinstance(values[0], list | tuple) else [values]
        rows = [tuple(float(value) for value in row) for row in lists]
        return tuple(rows * levels if len(rows) == 1 else rows)

    sizes, ratios = each(generator.SIZES), each(generator.ASPECT_RATIOS)
    if len(set(map(len, sizes))) > 1 or len(set(map(len, ratios))) > 1:
        raise UserError(
            "MODEL.ANCHOR_GENERATOR has another number of SIZES or ASPECT_RATIOS on "
            "each map, which detectron2's RPN does not take"
        )
    strides = tuple(int(shape.stride) for shape in shapes)
    return Anchors(sizes, ratios, strides, float(generator.OFFSET))


def _boxes(cfg: CfgNode, records: list[dict[str, Any]], *, train: bool) -> SeenBoxes:
    augmentations = detection_utils.build_augmentation(cfg, is_train=False)
    draws = 1
    if train:
        augmentations = build_augmentations(cfg)
        count = sum(len(record.get("annotations", ())) for record in records)
        draws = max(1, min(_MOST_DRAWS, _ENOUGH // max(1, count)))
    seed = max(0, cfg.SEED)
    bar = tqdm(records, unit="image", disable=not sys.stderr.isatty())
    return seen_boxes(bar, augmentations, seed=seed, draws=draws).some(_ENOUGH, seed=seed)


def _bar(text: str, unit: str) -> tqdm:
    return tqdm(desc=text, unit=unit, disable=not sys.stderr.isatty())


def _table(
    names: Sequence[str], training: SeenBoxes, test: SeenBoxes, now: Anchors, fitted: Anchors
) -> str:
    lines = [
        f"{', '.join(names)}: {len(training)} boxes at training size, {len(test)} at test size",
        f"{'':26}{'IoU >= 0.5':>12}{'IoU >= 0.7':>12}{'mean IoU':>12}",
    ]
    for place, seen in (("training", training), ("test", test)):
        for which, anchors in (("now", now), ("fitted", fitted)):
            found = coverage(seen, anchors)
            figures = f"{found.recall_50:12.1%}{found.recall_70:12.1%}{found.mean:12.3f}"
            lines.append(f"{f'at {place} size, {which}':26}{figures}")
    return "\n".join(lines)


def _yaml(anchors: Anchors) -> str:
    sizes, ratios = (
        ", ".join(f"[{', '.join(f'{value:g}' for value in level)}]" for level in levels)
        for levels in (anchors.sizes, anchors.ratios)
    )
    if len(set(anchors.ratios)) == 1:
        ratios = ratios[: ratios.index("]") + 1]
    return f"MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: [{sizes}]\n    ASPECT_RATIOS: [{ratios}]\n"
