"""The numbers that COCO results give to images and categories."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.predict.inputs import Source


def category_ids(cfg: CfgNode, class_names: Sequence[str]) -> list[int]:
    """Those of a data set that DATASETS names, where it is known here and has them; else 1, 2, ...

    Args:
        cfg: the model's.
        class_names: the model's, in the order of class ids.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        # Asking for what is not registered would register it.
        if name in MetadataCatalog.list():
            metadata = MetadataCatalog.get(name)
            known = metadata.get("thing_dataset_id_to_contiguous_id") or {}
            if list(metadata.get("thing_classes") or []) == list(class_names) and known:
                return [number for number, _ in sorted(known.items(), key=lambda item: item[1])]
    return list(range(1, len(class_names) + 1))


def read_ids(
    path: Path, class_names: Sequence[str], sources: Sequence[Source]
) -> tuple[list[int], dict[str, int]]:
    """The numbers in a COCO json, such as the ground truth to score the results with.

    Args:
        path: of the json.
        class_names: of the model; each has to be a category's.
        sources: images; each path has to end as a file_name does, and no other.

    Returns:
        category ids in the order of the classes, and image ids by path.

    Raises:
        UserError: the file is no COCO json, or a class or image is not in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = {str(entry["name"]): int(entry["id"]) for entry in content["categories"]}
        images = {str(entry["file_name"]): int(entry["id"]) for entry in content["images"]}
    except OSError as error:
        raise UserError(f"--like {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--like {path} is no COCO json: {_words(error)}") from error
    for name in class_names:
        if name not in categories:
            raise UserError(f"--like {path} has no category '{name}', which the model predicts")
    by_name: dict[str, list[str]] = {}
    for file_name in images:
        by_name.setdefault(PurePath(file_name).name, []).append(file_name)
    numbers = {}
    for source in sources:
        whole = "/" + Path(source.path).absolute().as_posix().lstrip("/")
        same = by_name.get(PurePath(source.path).name, [])
        matches = [name for name in same if whole.endswith("/" + name.lstrip("/"))]
        if source.kind != "image" or len(matches) != 1:
            found = "not in it" if not matches else "in it more than once"
            raise UserError(f"--like {path}: {source.path} is {found}")
        numbers[source.path] = images[matches[0]]
    return [categories[name] for name in class_names], numbers


def _words(error: Exception) -> Any:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)[:100]
