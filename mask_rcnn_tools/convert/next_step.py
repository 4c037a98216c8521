"""Builds the training command for converted data sets."""

from collections.abc import Sequence
from pathlib import Path

from mask_rcnn_plus.data import dataset_root
from mask_rcnn_plus.data.coco_json import parse
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.result import CheckResult
from mask_rcnn_tools.convert.labels import split_of
from mask_rcnn_tools.terminal import quote, shell_command


def next_step(output: Path, results: Sequence[CheckResult]) -> str:
    """The commands that train on a new data set, and on all that were converted beside it.

    Only data sets with the same classes in the same order can be trained on together.

    Args:
        output: the folder of the data set, an absolute path.
        results: of the check of its new jsons.
    """
    classes = [name for name, _, _ in results[0].classes]
    found = {
        path: _converted_classes(path)
        for path in sorted(output.parent.glob("[!.]*/[!.]*.json"))
        if path.is_file()
    }
    same = [path for path in found if found[path] == classes]
    here = [path for path in same if path.parent == output]
    options = " MODEL.MASK_ON False" * any("no-masks" in result.kinds() for result in results)
    if not (command := _training(here)):
        return (
            f"written: {output}; it has no training split with objects, so it cannot be trained on"
        )
    lines = [f"written: {output}; to train on it:", f"  {command}{options}"]
    if len(same) > len(here):
        lines.append("to train on all that is converted and has the same classes:")
        lines.append(f"  {_training(same)}{options}")
    for path in found:
        if path.parent == output and found[path] and path not in same:
            note = (
                f"{path.name} has other classes; to train on it too, convert all sources with the "
                "same --classes"
            )
            lines.insert(0, note)
    return "\n".join(lines)


def _training(jsons: list[Path]) -> str:
    """The command that trains on some jsons of one data set root; "" without one to train on."""
    train, test = (
        tuple(f"{path.parent.name}_{path.stem}" for path in jsons if split_of(path.stem) in splits)
        for splits in (("train", ""), ("val",))
    )
    if not train:
        return ""
    root = jsons[0].parents[1]
    environment = ""
    if root != dataset_root().resolve():
        environment = f"DETECTRON2_DATASETS={quote(str(root))} "
    keys = ("DATASETS.TRAIN", train, "DATASETS.TEST", test)
    command = shell_command("train_net.py", "--config-file", "configs/small_data.yaml", *keys)
    return environment + command


def _converted_classes(path: Path) -> list[str]:
    """The classes of a json that this command has written; [] if it has no objects."""
    try:
        with path.open("rb") as file:
            if b"converted from" not in file.read(1000):
                return []
        content = parse(path)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        return [category["name"] for category in categories if content["annotations"]]
    except (OSError, UserError, KeyError, TypeError):  # changed by hand
        return []
