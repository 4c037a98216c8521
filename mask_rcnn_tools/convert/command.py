"""Converts the labels of other tools into a data set folder with COCO json, and checks it."""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from mask_rcnn_tools.arguments import Parser, existing_folder, existing_path, fraction

PROGRAM = "mask-rcnn-plus convert"


class Format(NamedTuple):
    """A label format. ``mask_rcnn_tools.convert.NAME.read`` reads SOURCE.

    Attributes:
        options: the options of this format, in addition to those of all formats. They are the
            keyword arguments of ``read``.
        title: completes "Converts ...".
        source: describes SOURCE.
        example: the arguments of an example.
    """

    options: tuple[str, ...]
    title: str
    source: str
    example: str


FORMATS = {
    "labelme": Format(
        ("images",),
        "labelme's json files",
        "a folder of labelme's json files (also in subfolders), or one json file",
        "labelme photos --output datasets/pets",
    ),
    "via": Format(
        ("images", "class_attribute", "class_name"),
        "labels of the VGG Image Annotator (VIA) 2",
        "a project of VIA 2, annotations exported as JSON or CSV, or a folder of such files",
        "via project.json --images photos --class-attribute species --output datasets/pets",
    ),
    "voc": Format(
        ("classes",),
        "instance masks in Pascal VOC's layout",
        "a folder with JPEGImages, SegmentationObject, SegmentationClass (and ImageSets)",
        "voc VOCdevkit/VOC2012 --output datasets/voc",
    ),
    "yolo": Format(
        ("classes",),
        "YOLO's segmentation labels",
        "the folder with data.yaml, images/ and labels/ (polygons), or the yaml file. Without a "
        "yaml, images/train and images/val (or train/images and valid/images) are the splits",
        "yolo pets-seg --output datasets/pets",
    ),
    "masks": Format(
        ("class_name",),
        "folders of binary masks",
        "a folder with images/NAME.jpg and masks/NAME/*.png or masks/NAME_*.png (one file per "
        "object), or with NAME/images/*.png and NAME/masks/*.png. A folder CLASS names the class: "
        "masks/NAME/CLASS/*.png, masks/CLASS/NAME_*.png or NAME/masks/CLASS/*.png",
        "masks nuclei --class-name nucleus --output datasets/nuclei",
    ),
}

_EPILOG = """\
example:
  {program} {example}

Masks: polygons stay polygons, clipped to the image. Pixel masks become run lengths (RLE) of exactly
the same pixels. Circles and ellipses become polygons with a deviation below 0.02 pixels.
Images: the files stay unchanged. The EXIF orientation is respected, as in the labelling tools.
Splits: the split of an image depends only on its file name and --seed, so that it stays the same
when you add images. With few images, train gets at least one image with objects, and val too if
there are two.
Class ids: in alphabetical order, in the order of the source, or in that of --classes.
Files outside SOURCE and --images are never read, whatever the labels say.

exit code: 0 if everything was converted and the data check finds no error; 1 if something was
skipped (it is listed) or the check finds an error; 2 if nothing could be converted
"""


def main(argv: Sequence[str]) -> int:
    """Converts labels: returns 1 if something was skipped or the data check finds an error."""
    arguments = _parse(argv)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_tools.convert.run import run

    return run(arguments, FORMATS[arguments.format].options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        epilog=f"{PROGRAM} FORMAT --help explains the options of a format. To convert weights, use "
        "mask-rcnn-plus convert-torchvision.\n\n"
        + _EPILOG.format(program=PROGRAM, example=FORMATS["labelme"].example),
    )
    parser.add_argument("format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="SOURCE --output FOLDER ...")
    name = parser.parse_args(argv[:1]).format
    if name not in FORMATS:
        close = get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the formats are {', '.join(FORMATS)}"
        parser.error(f"unknown format '{name}'; {hint}")
    parser = _format_parser(name)
    arguments = parser.parse_args(argv[1:])
    arguments.format = name
    _check(arguments, parser)
    return arguments


def _format_parser(name: str) -> Parser:
    label_format = FORMATS[name]
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=f"Converts {label_format.title} into a data set folder, and checks it.",
        epilog=_EPILOG.format(program=PROGRAM, example=label_format.example),
    )
    parser.add_argument("source", type=existing_path, metavar="SOURCE", help=label_format.source)
    parser.add_output(
        "FOLDER",
        "datasets/NAME; images/, train.json and val.json are written into it, as the data sets "
        "NAME_train and NAME_val",
    )
    if "images" in label_format.options:
        parser.add_argument(
            "--images",
            type=existing_folder,
            metavar="FOLDER",
            help="the folder of the images, if not SOURCE",
        )
    if "class_attribute" in label_format.options:
        parser.add_argument(
            "--class-attribute", metavar="NAME", help="the region attribute that names the class"
        )
    if "class_name" in label_format.options:
        is_default = name == "masks"
        parser.add_argument(
            "--class-name",
            metavar="NAME",
            default="object" if is_default else None,
            help="the class of masks that are not in a folder CLASS (default: object)"
            if is_default
            else "the class of all objects",
        )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="the class names, in the order of the source's class indices"
        if "classes" in label_format.options
        else "the class names, in the order of their ids; objects of other classes are left out",
    )
    parser.add_argument(
        "--val",
        type=fraction,
        metavar="FRACTION",
        help="the fraction of the images for val.json (default: the splits of the source, or 0.2)",
    )
    parser.add_argument("--split", metavar="NAME", help="put all images into NAME.json instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random split (default: 0)")
    parser.add_max_pixels()
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copy the images (default)")
    how.add_argument(
        "--link", action="store_true", help="make hard links to the images, which need no space"
    )
    return parser


def _check(arguments: argparse.Namespace, parser: Parser) -> None:
    """Refuses invalid arguments before any file is read."""
    source, output = arguments.source, arguments.output
    if arguments.format in ("voc", "masks") and not source.is_dir():
        parser.error(f"SOURCE: '{source}' is not a folder")
    if output.exists() and not output.is_dir():
        parser.error(f"--output {output} is a file; name a folder")
    target, top = output.resolve(), (source if source.is_dir() else source.parent).resolve()
    if target == top or (source.is_dir() and target.is_relative_to(top)):
        parser.error(f"--output {output} is inside SOURCE; name another folder")
    if arguments.val == 1:
        parser.error("--val 1 leaves no images to train on; use a fraction below 1")
    if arguments.split is not None:
        if arguments.val is not None:
            parser.error("--val and --split exclude each other")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", arguments.split):
            parser.error(f"--split: use letters, digits, _ and -, got '{arguments.split}'")
        if arguments.split == "images":
            parser.error("--split images: this is the name of the image folder; use another")
    if getattr(arguments, "class_attribute", None) and getattr(arguments, "class_name", None):
        parser.error("--class-attribute and --class-name exclude each other")
