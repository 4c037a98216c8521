"""Finds problems in data sets in COCO format, and writes a repaired json."""

import argparse
from collections.abc import Sequence

from mask_rcnn_tools.arguments import Parser, any_path, existing_file, existing_folder
from mask_rcnn_tools.files import require_new

PROGRAM = "mask-rcnn-plus check-data"

_EPILOG = f"""
examples:
  check the sets of a training together: their classes, and images that are in both:
    {PROGRAM} balloons_train balloons_val
  compare box sizes with the anchors of the training config:
    {PROGRAM} balloons_train --config-file configs/coco/mask_rcnn_R_50_FPN_1x.yaml
  check a json that is not in the data set folder, and write a repaired copy:
    {PROGRAM} --json-file annotations.json --image-root photos --repair repaired.json

error: training or evaluation fails, is wrong, or silently loses an object. train_net.py refuses
such a data set, unless DATA_CHECK is repair or off.
warning: training and evaluation work, but perhaps not as you intend.
note: good to know.

Results are cached in $MASK_RCNN_PLUS_CACHE (default: ~/.cache/mask_rcnn_plus) until a file changes.

exit code: 0 without errors, or if --repair has repaired all of them; 1 with errors; 2 for invalid
arguments
"""


def main(argv: Sequence[str]) -> int:
    """Checks data sets: returns 1 if one has errors that --repair has not repaired, else 0."""
    arguments = _parse(argv)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_tools.check.run import run

    return run(arguments)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a data set, as in DATASETS.TRAIN")
    parser.add_argument(
        "--json-file", type=existing_file, metavar="FILE", help="a json instead of NAME"
    )
    parser.add_argument(
        "--image-root",
        type=existing_folder,
        metavar="FOLDER",
        help="the image folder of --json-file",
    )
    parser.add_argument(
        "--images",
        choices=("none", "headers", "decode"),
        default="decode",
        help="how much to read of the image files: nothing, the headers, or everything (default)",
    )
    parser.add_argument(
        "--config-file",
        type=existing_file,
        metavar="YAML",
        help="compare box sizes with the anchors of this config, if it has sizes",
    )
    parser.add_max_pixels()
    parser.add_argument("--repair", type=any_path, metavar="OUT.json", help="write a repaired json")
    parser.add_argument("--json", type=any_path, metavar="FILE", help="write all problems as JSON")
    parser.add_overwrite()
    arguments = parser.parse_args(argv)
    if (arguments.json_file is None) != (arguments.image_root is None):
        parser.error("--json-file and --image-root need each other")
    if bool(arguments.names) == (arguments.json_file is not None):
        parser.error("give either names of data sets, or --json-file and --image-root")
    if arguments.repair is not None and len(arguments.names) > 1:
        parser.error("--repair repairs only one data set at a time")
    for option in ("repair", "json"):
        if (path := getattr(arguments, option)) is not None:
            require_new(path, overwrite=arguments.overwrite, option=f"--{option}")
    return arguments
