"""Finds anchors that cover the boxes of a data set, at the sizes that a config trains on."""

import argparse
from collections.abc import Sequence

from mask_rcnn_tools.arguments import Parser, any_path
from mask_rcnn_tools.files import require_new, write_file

PROGRAM = "mask-rcnn-plus fit-anchors"

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml balloons_train --output anchors.yaml

The command measures boxes after the config's resizing, cropping and jitter; it augments each image
several times if there are few. It fits as many anchors as the config has now, on the same
feature maps, so that weights still match.

Recall is the share of boxes that overlap an anchor, at its positions on the feature map, with an
IoU of at least 0.5 or 0.7. In the RPN, an IoU of 0.7 makes any anchor positive; below, only the
best anchor of a box is. The rows "at test size" are for the same boxes after the test's resizing.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    arguments = _parse(argv)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_plus.config import load_config
    from mask_rcnn_tools.fit_anchors.fitting import fit_to_datasets

    table, lines = fit_to_datasets(load_config(arguments.config_file), arguments.names)
    print(table)
    print(f"\n{lines}", end="")
    if arguments.output is not None:
        write_file(arguments.output, lines)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="data sets (default: DATASETS.TRAIN)"
    )
    parser.add_config(overrides=False)
    parser.add_argument(
        "--output",
        type=any_path,
        metavar="OUT.yaml",
        help="also write the config lines to this file",
    )
    parser.add_overwrite()
    arguments = parser.parse_args(argv)
    if arguments.output is not None:
        require_new(arguments.output, overwrite=arguments.overwrite)
    return arguments
