"""Loads a data set of any origin, or explains in one line why it cannot be used."""

import contextlib
import traceback
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, catalog
from detectron2.structures import BoxMode

from mask_rcnn_plus.data import folders
from mask_rcnn_plus.data.coco_json import read_coco_json, refuse_harmful_masks
from mask_rcnn_plus.data.file_names import missing_files, relative_name, resolve_names
from mask_rcnn_plus.data.folders import (
    dataset_root,
    is_by_folder,
    is_stale,
    register_folder_datasets,
)
from mask_rcnn_plus.errors import UserError, did_you_mean, reason

_MAX_NAMES = 10  # how many data sets a message lists


def require_dataset(name: str, *, training: bool = False) -> list[dict[str, Any]]:
    """Loads a data set of any origin and checks that it can be used.

    Args:
        name: as in DATASETS.TRAIN and DATASETS.TEST. If it is not registered,
            ``register_folder_datasets()`` is called first.
        training: whether it must have an annotation to train on: not a crowd, not an empty box.

    Returns:
        the records of its images, at least one, in detectron2's format.

    Raises:
        UserError: the name is not registered, loading fails, there are no images, images are
            missing on disk, or there is nothing to train on.
    """
    require_registered(name)
    if (files := coco_files(name)) and not is_by_folder(name):
        try:
            refuse_harmful_masks(files[0])
        except UserError as error:
            raise UserError(f"data set '{name}': {error}") from error
    try:
        loaded = DatasetCatalog.get(name)
        # detectron2 also accepts a torch Dataset.
        records = loaded if isinstance(loaded, list) else [loaded[i] for i in range(len(loaded))]
    except UserError:
        raise
    except Exception as error:
        raise UserError(_not_loaded(name, error)) from error
    if not records:
        raise UserError(f"data set '{name}' has no images{_origin(name)}")
    if kinds := [type(record).__name__ for record in records if not isinstance(record, dict)]:
        raise UserError(f"data set '{name}' contains a {kinds[0]}, expected detectron2's dicts")
    _check_images(name, [r["file_name"] for r in records if isinstance(r.get("file_name"), str)])
    if training and not any(map(_is_usable, records)):
        raise UserError(
            f"data set '{name}' has nothing to train on{_origin(name)}: all annotations of its "
            f"{len(records)} images are crowds or empty boxes"
        )
    return records


def require_registered(name: str) -> None:
    """Raises a UserError if a data set is neither in detectron2's catalog nor in a folder."""
    if name not in DatasetCatalog:
        names = register_folder_datasets()
        if name not in DatasetCatalog:
            raise UserError(_not_registered(name, names))


def coco_files(name: str) -> tuple[Path, Path] | None:
    """The json and the image folder of a data set in COCO format.

    Returns:
        None if the data set is not registered, has another format or its json is missing.
    """
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") != "coco" or not json_file or image_root is None:
        return None
    if "://" in str(json_file) or not Path(json_file).is_file():
        return None
    return Path(json_file).absolute(), Path(image_root).absolute()


def class_names(name: str) -> list[str]:
    """The classes of a data set, at least one, in the order of the indices that a model predicts.

    The data set is loaded only if its classes are unknown or its json has changed.

    Raises:
        UserError: as ``require_dataset``, or the metadata has no ``thing_classes``.
    """
    known = name in DatasetCatalog and MetadataCatalog.get(name).get("thing_classes")
    if not known or is_stale(name):
        require_dataset(name)
    names = MetadataCatalog.get(name).get("thing_classes")
    if not names:
        raise UserError(
            f"data set '{name}' does not name its classes: "
            f"set MetadataCatalog.get('{name}').thing_classes where you register it"
        )
    return list(names)


def _not_registered(name: str, names: list[str]) -> str:
    hint = did_you_mean(name, DatasetCatalog.list())
    root = dataset_root().absolute()
    for folder in sorted(root.glob("[!.]*/"), reverse=True):  # of a and a_b, the longer name first
        if name.startswith(f"{folder.name}_") and folder.is_dir():
            entries: list[str] = []
            split = name.removeprefix(f"{folder.name}_")
            with contextlib.suppress(OSError):
                entries = sorted(f"{e.name}/" if e.is_dir() else e.name for e in folder.iterdir())
            return (
                f"data set '{name}' is not registered: there is no '{folder}/{split}.json', and "
                f"the folder contains {_some(entries) or 'nothing'}{hint}"
            )
    content = "which has no data sets" if root.is_dir() else "which does not exist"
    if names:
        content = f"which has {_some(names)}"
    return (
        f"data set '{name}' is not registered{f'{hint} Looked' if hint else '; looked'} for "
        f"NAME/SPLIT.json in '{root}' (DETECTRON2_DATASETS), {content}"
    )


def _some(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _not_loaded(name: str, error: Exception) -> str:
    metadata = MetadataCatalog.get(name)
    json_file = str(metadata.get("json_file", ""))
    if json_file and "://" not in json_file:
        path = Path(json_file).absolute()
        if not path.is_file():
            return (
                f"data set '{name}' is registered, but its json is missing: put it at '{path}', "
                "or set DETECTRON2_DATASETS to the folder of your data sets"
            )
        if metadata.get("evaluator_type") == "coco":
            try:
                read_coco_json(path)
            except UserError as fault:
                return f"data set '{name}': {fault}"
    # The first frame outside this file and the catalogs: that of the registered function.
    frames = traceback.extract_tb(error.__traceback__)
    outside = (__file__, folders.__file__, catalog.__file__)
    frame = next((f for f in frames if f.filename not in outside), frames[0])
    return (
        f"data set '{name}' could not be loaded{_origin(name)}: {type(error).__name__}: "
        f"{reason(error, 300)} (in {Path(frame.filename).name}, line {frame.lineno})"
    )


def _origin(name: str) -> str:
    json_file = MetadataCatalog.get(name).get("json_file")
    return f" ('{json_file}')" if json_file else ""


def _check_images(name: str, file_names: list[str]) -> None:
    """Raises a UserError if files are missing."""
    absent = set(missing_files(file_names))
    missing = [file_name for file_name in file_names if file_name in absent]
    if not missing:
        return
    first = Path(missing[0]).absolute()
    where = "looked in" if first.parent.is_dir() else "there is no folder"
    advice = "put them there or correct 'file_name'"
    if image_root := MetadataCatalog.get(name).get("image_root"):
        raw = [relative_name(file_name, image_root) for file_name in file_names]
        found, doubts = resolve_names(raw, Path(image_root))
        if doubt := doubts.get(relative_name(missing[0], image_root)):
            advice = f"it {doubt}; correct 'file_name'"
        elif found and not is_by_folder(name):
            json_file = MetadataCatalog.get(name).get("json_file")
            advice = (
                f"{len(found)} of them have other names in '{image_root}': `mask-rcnn-plus "
                f"check-data --json-file {json_file} --image-root {image_root} --repair OUT.json` "
                "writes these, and DATA_CHECK repair trains with them"
            )
    raise UserError(
        f"data set '{name}': {len(missing)} of {len(file_names)} images are missing, the first is "
        f"'{first.name}' ({where} '{first.parent}'); {advice}{_origin(name)}"
    )


def _is_usable(record: dict[str, Any]) -> bool:
    """Whether detectron2 would train on at least one annotation of the image."""
    return any(
        not annotation.get("iscrowd", 0)
        and (annotation.get("bbox_mode") != BoxMode.XYWH_ABS or min(annotation["bbox"][2:]) > 0)
        for annotation in record.get("annotations", ())
    )
