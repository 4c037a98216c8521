"""Converts labels of other tools into a data set by folder, COCO json and images, and checks it."""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data import dataset_root
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_tools.arguments import Parser
from mask_rcnn_tools.check import ERROR, check_coco, note_leaks
from mask_rcnn_tools.convert import Found, Plan, labelme, masks, via, voc, write_coco, yolo

PROGRAM = "mask-rcnn-plus convert"

# Format -> its reader, which options it takes besides those of all, what SOURCE is, an example.
FORMATS: dict[str, tuple[Callable[..., Found], tuple[str, ...], str, str]] = {
    "labelme": (
        labelme.read,
        ("images",),
        "the folder of labelme's json files (folders within included), or one of them",
        "labelme photos --output datasets/pets",
    ),
    "via": (
        via.read,
        ("images", "class_attribute", "class_name"),
        "VIA 2's project, or its annotations exported as json or csv, or a folder of such files",
        "via project.json --images photos --class-attribute species --output datasets/pets",
    ),
    "voc": (
        voc.read,
        ("classes",),
        "a folder with JPEGImages, SegmentationObject and SegmentationClass (and ImageSets)",
        "voc VOCdevkit/VOC2012 --output datasets/voc",
    ),
    "yolo": (
        yolo.read,
        ("classes",),
        "the folder of data.yaml, images/ and labels/ with polygons, or the yaml; without one, "
        "images/train and images/val (or train/images and valid/images) are the splits",
        "yolo pets-seg --output datasets/pets",
    ),
    "masks": (
        masks.read,
        ("class_name",),
        "a folder of images/NAME.jpg and masks/NAME/*.png or masks/NAME_*.png, an object a file; "
        "or of NAME/images/*.png and NAME/masks/*.png; masks/NAME/CLASS/*.png, "
        "masks/CLASS/NAME_*.png and NAME/masks/CLASS/*.png name a class",
        "masks nuclei --class-name nucleus --output datasets/nuclei",
    ),
}

TITLES = {
    "labelme": "labelme's json files",
    "via": "labels of the VGG Image Annotator (VIA)",
    "voc": "instance masks in Pascal VOC's layout",
    "yolo": "YOLO's segmentation labels",
    "masks": "folders of binary masks",
}

_EPILOG = """\
example:
  {program} {example}

Polygons stay polygons (clipped to the image); pixel masks become run lengths, which say exactly the
same; circles and ellipses become polygons within 0.02 pixels of them. Images stay as they are, with
their EXIF orientation, by which they are turned when they are read, as the tool turned them.

The split follows from each file name and the seed alone: images that are added later move none; of
few images, one with objects goes to train and, of two, one to val.
Class ids follow the names' order in the alphabet, the source's own or that of --classes.
No file outside SOURCE and --images is read, whatever the labels name.

exit code: 0 when all was converted and the data check finds no error; 1 when something was skipped,
which is named, or the check finds an error; 2 when nothing could be converted
"""


def main(argv: Sequence[str]) -> int:
    """Converts, checks the result, and prints what was found.

    Args:
        argv: the format and the arguments; see ``--help``.

    Returns:
        the exit code: 0, or 1 if something was skipped or the data check finds an error.

    Raises:
        UserError: an argument does not fit, or nothing can be converted.
    """
    arguments = _parse(argv)
    reader, takes, *_ = FORMATS[arguments.format]
    options: dict[str, Any] = {name: getattr(arguments, name) for name in takes}
    if arguments.format == "masks":
        options["class_name"] = options["class_name"] or "object"
    found = reader(arguments.source, **options)
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
    jsons = write_coco(found, plan)
    name = arguments.output.resolve().name
    reports = [
        check_coco(path, arguments.output / "images", name=f"{name}_{path.stem}", images="decode")
        for path in jsons
    ]
    note_leaks(reports)
    for line in found.lines():
        print(line)
    if found.lines():
        print()
    print("\n\n".join(report.text() for report in reports))
    usable = [path.stem for path, r in zip(jsons, reports, strict=True) if r.annotations]
    print(f"\n{_next(arguments.output, usable, arguments.split)}")
    return int(bool(found.skipped) or any(report.kinds(ERROR) for report in reports))


def _next(output: Path, splits: list[str], chosen: str | None) -> str:
    """How to train on it.

    Args:
        output: its folder.
        splits: those with objects.
        chosen: --split.
    """
    name = output.resolve().name
    where = ""
    if output.resolve().parent != dataset_root().resolve():
        where = f"DETECTRON2_DATASETS={shlex.quote(str(output.resolve().parent))} "
    train = next((split for split in ("train", chosen) if split in splits), None)
    if train is None:
        return f"written: {output}, with nothing to train on"
    test = f"('{name}_val',)" if train == "train" and "val" in splits else "()"
    return (
        f"written: {output}; train on it with\n  {where}train_net.py --config-file "
        f'configs/small_data.yaml DATASETS.TRAIN "(\'{name}_{train}\',)" DATASETS.TEST "{test}"'
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        epilog=f"{PROGRAM} FORMAT --help says more. For weights there is convert-torchvision.\n\n"
        + _EPILOG.format(program=PROGRAM, example=FORMATS["labelme"][3]),
    )
    parser.add_argument("format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="SOURCE --output FOLDER ...")
    chosen = parser.parse_args(argv[:1])
    if chosen.format not in FORMATS:
        hint = did_you_mean(chosen.format, FORMATS) or f"; there are {', '.join(FORMATS)}"
        raise UserError(f"{PROGRAM} does not know the format '{chosen.format}'{hint}")
    arguments = _format_parser(chosen.format).parse_args(argv[1:])
    arguments.format = chosen.format
    _check(arguments)
    return arguments


def _format_parser(name: str) -> Parser:
    _, takes, what, example = FORMATS[name]
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=f"Makes {TITLES[name]} a data set by folder, and checks it.",
        epilog=_EPILOG.format(program=PROGRAM, example=example),
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="datasets/NAME: gets images/, train.json and val.json, the data sets NAME_train, ...",
    )
    if "images" in takes:
        parser.add_argument(
            "--images", type=Path, metavar="FOLDER", help="where the images lie, if not in SOURCE"
        )
    if "class_attribute" in takes:
        parser.add_argument(
            "--class-attribute", metavar="NAME", help="the region attribute that names the class"
        )
    if "class_name" in takes:
        default = ", where no folder names one (default: object)" if name == "masks" else ""
        parser.add_argument(
            "--class-name", metavar="NAME", help=f"the class of all objects{default}"
        )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="the names of the source's indices in their order"
        if "classes" in takes
        else "the classes in the order of their ids; objects of others are left out",
    )
    parser.add_argument(
        "--val",
        type=_fraction,
        metavar="PART",
        help="the part of the images for val.json (default: the source's own splits, else 0.2)",
    )
    parser.add_argument("--split", metavar="NAME", help="instead, put all images into NAME.json")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copy the images (the default)")
    how.add_argument(
        "--link",
        action="store_true",
        help="make hard links, which take no space: the same files under a second name",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of FOLDER")
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, not '{text}'")
    return value


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be done before anything is read."""
    source, output = arguments.source, arguments.output
    if not source.exists():
        raise UserError(f"there is no file or folder '{source}'")
    if arguments.format in ("voc", "masks") and not source.is_dir():
        raise UserError(f"'{source}' is no folder")
    if getattr(arguments, "images", None) is not None and not arguments.images.is_dir():
        raise UserError(f"there is no folder '{arguments.images}' (--images)")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    top = source if source.is_dir() else source.parent
    if output.resolve().is_relative_to(top.resolve()) and (
        source.is_dir() or output.resolve() == top.resolve()
    ):
        raise UserError(f"--output {output} lies in SOURCE; name a folder elsewhere")
    if arguments.split is not None:
        if arguments.val is not None:
            raise UserError("--val and --split exclude each other")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", arguments.split):
            raise UserError(f"--split '{arguments.split}' is no name: letters, digits, _ and -")
        if arguments.split == "images":
            raise UserError("--split images: the images lie in the folder of that name")
    both = getattr(arguments, "class_attribute", None) and getattr(arguments, "class_name", None)
    if both:
        raise UserError("--class-attribute and --class-name exclude each other")
