"""Finds the objects in images, folders, videos or camera frames, and draws them."""

import argparse
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mask_rcnn_tools.arguments import (
    Parser,
    device,
    existing_file,
    existing_path,
    fraction,
    positive,
    weights,
)
from mask_rcnn_tools.models.zoo import DEFAULT, zoo_weights
from mask_rcnn_tools.predict.layout import check_output
from mask_rcnn_tools.predict.sources import find_sources

PROGRAM = "mask-rcnn-plus predict"

# Config keys that an option sets; --set would have no effect.
_OPTIONS = {
    "MODEL.WEIGHTS": "--weights or --model",
    "MODEL.DEVICE": "--device",
    "INPUT.MAX_PIXELS": "--max-pixels",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "--score-threshold",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "--score-threshold",
}

_EPILOG = f"""
examples:
  COCO's 80 classes, with a model that is downloaded once:
    {PROGRAM} photo.jpg
  a checkpoint of train_net.py, which contains its config and class names:
    {PROGRAM} --weights output/model_final.pth photo.jpg
  folders, patterns and videos together, with COCO results and a table:
    {PROGRAM} --weights output/model_final.pth photos "more/*.png" clip.mp4 --json --csv
  another model of detectron2's zoo, only people and dogs:
    {PROGRAM} --model mask_rcnn_X_101_32x8d_FPN_3x --classes person,dog street.jpg
  small objects in a large image:
    {PROGRAM} --weights output/model_final.pth --slice 1024 --overlap 0.2 aerial.tif
  the first camera, until Ctrl-C:
    {PROGRAM} --weights output/model_final.pth 0

files in the output folder:
  each image with its objects drawn, under the same name (PNG, unless the image is JPEG or PNG; a
    second x.jpg becomes x_2.jpg; small images are enlarged), and each video as NAME.mp4, without
    sound
  --json     predictions.json, COCO results with run-length encoded masks, and images.json, the
             images and categories that their ids refer to
  --csv      objects.csv: boxes and centroids in pixels, areas in pixels of the mask
  --cutouts  cutouts/: a PNG per object
Coordinates start at the top left corner of the image; the first pixel spans 0 to 1. Images are
turned upright by their EXIF orientation. Existing files are replaced only with --overwrite.

exit code: 0 if everything was read; 1 if a file could not be read, or a folder contains other files
than images (the command names them and continues); 2 if the command line, the weights or the config
are wrong; 130 after Ctrl-C, which leaves complete files of the finished images (0 with a camera)
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command: returns 1 if a file was not read, else 0."""
    arguments = _parse(argv)
    # OpenCV's own messages about broken files would repeat ours. It reads the first variable when
    # it is imported.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    sources, left_out = find_sources(
        arguments.inputs, recursive=arguments.recursive, output=arguments.output
    )
    check_output(arguments, sources)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_tools.predict.run import run

    return run(arguments, sources, left_out)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add(
        "inputs",
        nargs="+",
        type=_input,
        metavar="INPUT",
        help='an image, a folder, a pattern such as "photos/*.jpg", a video, or the number of a '
        "camera",
    )
    model = parser.add_mutually_exclusive_group().add_argument
    model("--weights", type=weights, metavar="FILE", help="checkpoint: .pth, or .pkl from the zoo")
    model(
        "--model",
        dest="weights",
        type=zoo_weights,
        metavar="NAME",
        help=f"model of detectron2's zoo, see mask-rcnn-plus models (default: {DEFAULT})",
    )
    add(
        "--config-file",
        type=existing_file,
        metavar="YAML",
        help="config, if FILE does not contain it",
    )
    add(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="set a config key, e.g. TEST.AUG.ENABLED True for test-time augmentation; may be "
        "repeated",
    )
    add(
        "--trust-checkpoint",
        action="store_true",
        help="read FILE as a full pickle, which may run any code",
    )
    add(
        "--device",
        type=device,
        default="auto",
        metavar="NAME",
        help="auto (default), cpu, cuda, cuda:1",
    )
    add(
        "--optimize",
        choices=("fp32", "bf16", "fp16"),
        help="run a copy of the model that is optimized for speed, in this precision",
    )
    add("--recursive", action="store_true", help="include the folders inside folders")
    add("--batch-size", type=positive, default=4, metavar="N", help="images per batch (default: 4)")
    add(
        "--score-threshold",
        type=fraction,
        default=0.5,
        metavar="S",
        help="lowest score, from 0 to 1 (default: 0.5)",
    )
    add(
        "--classes",
        action="append",
        metavar="NAME,...",
        help="keep only these classes; names may contain commas",
    )
    add("--max-detections", type=positive, metavar="N", help="keep only the N best per image")
    add("--slice", type=positive, metavar="PIXELS", help="predict on tiles with this side")
    add(
        "--overlap",
        type=fraction,
        metavar="PART",
        help="part of a tile that it shares with the next one (default: 0.2)",
    )
    parser.add_max_pixels()
    parser.add_output("FOLDER", "where to write", default=Path("output/predictions"))
    add("--pictures", action=switch, default=True, help="write images and videos with the objects")
    add("--masks", action=switch, help="draw masks (default: yes)")
    for name in ("boxes", "labels", "scores"):
        add(f"--{name}", action=switch, help=f"draw {name} (default: up to 30 objects)")
    add("--json", action="store_true", help="write COCO results")
    add(
        "--like",
        type=existing_file,
        metavar="JSON",
        help="give images and categories in the results the ids that they have, by name, in this "
        "COCO json",
    )
    add("--csv", action="store_true", help="write a table of objects")
    add("--cutouts", action="store_true", help="write each object as a transparent PNG")
    arguments = parser.parse_args(argv)
    if not (arguments.pictures or arguments.json or arguments.csv or arguments.cutouts):
        parser.error("--no-pictures leaves nothing to write: add --json, --csv or --cutouts")
    if arguments.overlap is not None and arguments.slice is None:
        parser.error("--overlap needs --slice")
    if arguments.like is not None and not arguments.json:
        parser.error("--like needs --json")
    if arguments.slice is not None and arguments.slice < 32:
        parser.error(f"--slice: tiles must have at least 32 pixels, got {arguments.slice}")
    if arguments.overlap is not None and arguments.overlap > 0.9:
        parser.error(f"--overlap must be between 0 and 0.9, got {arguments.overlap}")
    if arguments.classes and not re.search(r"[^\s,]", "".join(arguments.classes)):
        parser.error("--classes names no class")
    for key, _ in arguments.set:
        if key in _OPTIONS:
            parser.error(f"--set {key} would have no effect: use {_OPTIONS[key]}")
    if arguments.weights is None:
        if arguments.config_file:
            parser.error("--config-file needs --weights")
        arguments.weights = zoo_weights(DEFAULT)
    arguments.overlap = 0.2 if arguments.overlap is None else arguments.overlap
    return arguments


def _input(text: str) -> str:
    """An INPUT; the number of a camera and a pattern need not exist as files."""
    return text if text.isdecimal() or glob.has_magic(text) else str(existing_path(text))
