"""Converts the labels of other tools into a data set folder with COCO json, and checks it."""

import argparse
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_tools.arguments import Parser, fraction
from mask_rcnn_tools.check import ERROR, check_coco, note_leaks
from mask_rcnn_tools.convert import coco, cvat, label_studio, labelme, masks, via, voc, yolo
from mask_rcnn_tools.convert.labels import Labels
from mask_rcnn_tools.convert.next_step import next_step
from mask_rcnn_tools.convert.writing import Plan, write_coco

PROGRAM = "mask-rcnn-plus convert"


class Format(NamedTuple):
    """A label format.

    Attributes:
        read: reads SOURCE; the options are its keyword arguments.
        options: the options of this format, in addition to those of all formats.
        title: completes "Converts ...".
        source: describes SOURCE.
        example: the arguments of an example.
    """

    read: Callable[..., Labels]
    options: tuple[str, ...]
    title: str
    source: str
    example: str


FORMATS = {
    "coco": Format(
        coco.read,
        ("images",),
        "COCO json as exported by Roboflow, CVAT, Label Studio, FiftyOne and others",
        "the folder of the export (unpacked), with its jsons and images, or one json file",
        "coco pets.v1.coco-segmentation --output datasets/pets",
    ),
    "cvat": Format(
        cvat.read,
        ("images",),
        "XML of CVAT (CVAT for images 1.1)",
        "the folder of the export (unpacked), with annotations.xml and images/, or one XML file",
        "cvat task_1 --output datasets/pets",
    ),
    "label-studio": Format(
        label_studio.read,
        ("images",),
        "Label Studio's own JSON",
        "a JSON export (not JSON-MIN), or a folder of them",
        "label-studio project-1.json --images photos --output datasets/pets",
    ),
    "labelme": Format(
        labelme.read,
        ("images",),
        "labelme's json files",
        "a folder of labelme's json files (also in subfolders), or one json file",
        "labelme photos --output datasets/pets",
    ),
    "via": Format(
        via.read,
        ("images", "class_attribute", "class_name"),
        "labels of the VGG Image Annotator (VIA) 2",
        "a project of VIA 2, annotations exported as JSON or CSV, or a folder of such files",
        "via project.json --images photos --class-attribute species --output datasets/pets",
    ),
    "voc": Format(
        voc.read,
        ("classes",),
        "instance masks in Pascal VOC's layout",
        "a folder with JPEGImages, SegmentationObject, SegmentationClass (and ImageSets)",
        "voc VOCdevkit/VOC2012 --output datasets/voc",
    ),
    "yolo": Format(
        yolo.read,
        ("classes",),
        "YOLO's segmentation labels",
        "the folder with data.yaml, images/ and labels/ (polygons), or the yaml file. Without a "
        "yaml, images/train and images/val (or train/images and valid/images) are the splits",
        "yolo pets-seg --output datasets/pets",
    ),
    "masks": Format(
        masks.read,
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
    """Converts labels, checks the new data set, and prints the results."""
    arguments = _parse(argv)
    limit_pixels(arguments.max_pixels)
    label_format = FORMATS[arguments.format]
    options: dict[str, Any] = {name: getattr(arguments, name) for name in label_format.options}
    labels = label_format.read(arguments.source, **options)
    plan = Plan(
        arguments.output,
        arguments.format,
        classes=arguments.classes,
        val=arguments.val,
        split=arguments.split,
        seed=arguments.seed,
        link=arguments.link,
        overwrite=arguments.overwrite,
    )
    jsons = write_coco(labels, plan)
    name = arguments.output.resolve().name
    results = [
        check_coco(path, arguments.output / "images", name=f"{name}_{path.stem}", images="decode")
        for path in jsons
    ]
    note_leaks(results)
    if lines := labels.lines():
        print("\n".join(lines), end="\n\n")
    print("\n\n".join(result.text() for result in results))
    print(f"\n{next_step(arguments.output.resolve(), results)}")
    return int(bool(labels.skipped) or any(result.kinds(ERROR) for result in results))


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
        hint = did_you_mean(name, FORMATS) or f"; the formats are {', '.join(FORMATS)}"
        raise UserError(f"{PROGRAM}: unknown format '{name}'{hint}")
    arguments = _format_parser(name).parse_args(argv[1:])
    arguments.format = name
    _check(arguments)
    return arguments


def _format_parser(name: str) -> Parser:
    label_format = FORMATS[name]
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=f"Converts {label_format.title} into a data set folder, and checks it.",
        epilog=_EPILOG.format(program=PROGRAM, example=label_format.example),
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help=label_format.source)
    parser.add_output(
        "FOLDER",
        "datasets/NAME; images/, train.json and val.json are written into it, as the data sets "
        "NAME_train and NAME_val",
    )
    if "images" in label_format.options:
        parser.add_argument(
            "--images", type=Path, metavar="FOLDER", help="the folder of the images, if not SOURCE"
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


def _check(arguments: argparse.Namespace) -> None:
    """Refuses invalid arguments before any file is read."""
    source, output = arguments.source, arguments.output
    if not source.exists():
        raise UserError(f"SOURCE: there is no file or folder '{source}'")
    if source.is_file() and zipfile.is_zipfile(source):
        raise UserError(f"SOURCE: '{source}' is a zip archive; unpack it and name the folder")
    if arguments.format in ("voc", "masks") and not source.is_dir():
        raise UserError(f"SOURCE: '{source}' is not a folder")
    if getattr(arguments, "images", None) is not None and not arguments.images.is_dir():
        raise UserError(f"--images: there is no folder '{arguments.images}'")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    target, top = output.resolve(), (source if source.is_dir() else source.parent).resolve()
    if target == top or (source.is_dir() and target.is_relative_to(top)):
        raise UserError(f"--output {output} is inside SOURCE; name another folder")
    if arguments.val == 1:
        raise UserError("--val 1 leaves no images to train on; use a fraction below 1")
    if arguments.split is not None:
        if arguments.val is not None:
            raise UserError("--val and --split exclude each other")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", arguments.split):
            raise UserError(f"--split: use letters, digits, _ and -, got '{arguments.split}'")
        if arguments.split == "images":
            raise UserError("--split images: this is the name of the image folder; use another")
    if getattr(arguments, "class_attribute", None) and getattr(arguments, "class_name", None):
        raise UserError("--class-attribute and --class-name exclude each other")
