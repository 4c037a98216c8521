"""Draws training images as the model sees them: resized and augmented, with their objects."""

import argparse
from collections.abc import Sequence

from mask_rcnn_tools.arguments import Parser, positive
from mask_rcnn_tools.files import require_new, write_file

PROGRAM = "mask-rcnn-plus show-data"

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml --output data.png --images 12 \\
      DATASETS.TRAIN "('balloons_train',)" INPUT.JITTER.ENABLED True

These are the first images that train_net.py would train on with this config; another SEED shows
other images. Above each image are its name, its size in pixels and the number of its objects.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    arguments = _parse(argv)
    import cv2

    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_plus.config import load_config
    from mask_rcnn_tools.show_data.drawing import draw_samples

    cfg = load_config(arguments.config_file, arguments.opts)
    image = draw_samples(cfg, count=arguments.images, side=arguments.side)
    write_file(arguments.output, cv2.imencode(arguments.output.suffix, image)[1].tobytes())
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_config()
    parser.add_output("IMAGE", "file to write, .png or .jpg")
    parser.add_argument(
        "--images", type=positive, default=9, metavar="N", help="number of images (default: 9)"
    )
    parser.add_argument(
        "--side",
        type=positive,
        default=400,
        metavar="PIXELS",
        help="longer side of each image in the drawing (default: 400)",
    )
    arguments = parser.parse_args(argv)
    if arguments.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--output {arguments.output}: name a .png or .jpg file")
    require_new(arguments.output, overwrite=arguments.overwrite)
    return arguments
