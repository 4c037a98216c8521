"""The command line of ``predict``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mask_rcnn_plus.engine.weights import TRUST_FLAG
from mask_rcnn_tools.arguments import Parser, positive
from mask_rcnn_tools.predict.outputs import IMAGES, RESULTS, TABLE

PROGRAM = "mask-rcnn-plus predict"

# Config keys that options set, whatever --set says.
_OPTIONS = {
    "MODEL.WEIGHTS": "--weights",
    "MODEL.DEVICE": "--device",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "--score-threshold",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "--score-threshold",
}

_DESCRIPTION = "Finds the objects in images, folders, videos or a camera's picture, and draws them."

_EPILOG = f"""
examples:
  a checkpoint of train_net.py knows its config and its classes:
    {PROGRAM} --weights output/model_final.pth photo.jpg
  folders, patterns and videos together, with COCO results and a table:
    {PROGRAM} --weights output/model_final.pth photos "more/*.png" clip.mp4 --json --csv
  a model of detectron2's zoo, people and dogs alone:
    {PROGRAM} --weights model_final_f10217.pkl \\
        --config-file configs/coco/mask_rcnn_R_50_FPN_3x.yaml --classes person,dog street.jpg
  small objects in a large image:
    {PROGRAM} --weights output/model_final.pth --slice 1024 --overlap 0.2 aerial.tif
  the first camera, until Ctrl-C:
    {PROGRAM} --weights output/model_final.pth 0

Below --output: a drawing of each image under its name (JPEG and PNG as they are, others as PNG; a
second x.jpg becomes x_2.jpg); of each video NAME.mp4, without sound. --json writes {RESULTS},
COCO's results with run-length encoded masks, and {IMAGES}, what their numbers mean; --csv
{TABLE}, boxes and centroids in pixels, areas in pixels of the mask; --cutouts a folder of
PNG files. Coordinates count from the image's top left corner, the first pixel spanning 0 to 1.
Images are turned upright as EXIF says. Nothing that exists is replaced without --overwrite.

exit code: 0; 1 where files could not be read: they are named, and the rest was predicted on; 2 for
what is wrong with the command line, the weights or the config; 130 after Ctrl-C, which leaves
complete files of what was done (0 with a camera, which ends so)
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments; raises UserError where they do not go together."""
    parser = Parser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern, video, camera's number")
    add("--weights", required=True, metavar="FILE", help="checkpoint: .pth, or the zoo's .pkl")
    add("--config-file", metavar="YAML", help="for weights that carry no config")
    add(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="a config key, as TEST.AUG.ENABLED True for test-time augmentation",
    )
    add(TRUST_FLAG, action="store_true", help="read FILE as a full pickle, which may run any code")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:1")
    add(
        "--optimize",
        choices=("fp32", "bf16", "fp16"),
        help="run a copy of the model that is made for speed, in this precision",
    )
    add("--recursive", action="store_true", help="folders with all folders in them")
    add("--batch-size", type=positive, default=4, metavar="N", help="images at once (default 4)")
    add("--score-threshold", type=_part, default=0.5, metavar="S", help="0 to 1 (default 0.5)")
    add("--classes", action="append", metavar="NAME,...", help="these classes alone")
    add("--max-detections", type=positive, metavar="N", help="the N best of each image alone")
    add("--slice", type=positive, metavar="PIXELS", help="predict on tiles of this side")
    add("--overlap", type=_part, metavar="PART", help="of a tile with the next (default 0.2)")
    add("--output", type=Path, default=Path("output/predictions"), metavar="FOLDER")
    add("--overwrite", action="store_true", help="replace files of an earlier run")
    add("--pictures", action=argparse.BooleanOptionalAction, default=True, help="draw")
    for name in ("masks", "boxes", "labels", "scores"):
        what = "draw them" if name == "masks" else "draw them (default: not of a crowd)"
        add(f"--{name}", action=argparse.BooleanOptionalAction, help=what)
    add("--json", action="store_true", help="write COCO results")
    add(
        "--like",
        type=Path,
        metavar="JSON",
        help="number images and categories in them as this COCO json does, by name",
    )
    add("--csv", action="store_true", help="write a table of objects")
    add("--cutouts", action="store_true", help="write each object alone, the rest transparent")
    arguments = parser.parse_args(argv)
    if not (arguments.pictures or arguments.json or arguments.csv or arguments.cutouts):
        parser.error("--no-pictures leaves nothing to write: add --json, --csv or --cutouts")
    if arguments.overlap is not None and arguments.slice is None:
        parser.error("--overlap belongs to --slice")
    if arguments.like is not None and not arguments.json:
        parser.error("--like belongs to --json")
    for key, _ in arguments.set:
        if key in _OPTIONS:
            parser.error(f"--set {key} would have no effect: give {_OPTIONS[key]}")
    arguments.overlap = 0.2 if arguments.overlap is None else arguments.overlap
    return arguments


def _part(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not '{text}'")
    return number
