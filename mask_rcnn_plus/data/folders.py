"""Data sets by folder: what lies at $DETECTRON2_DATASETS/NAME/SPLIT.json is NAME_SPLIT."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from mask_rcnn_plus.data.coco_json import file_stamp, keypoint_metadata, read_categories
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

# What loading a json derives from it; detectron2's Metadata refuses to change any of it.
_DERIVED = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "keypoint_names",
    "keypoint_connection_rules",
    "keypoint_flip_map",
)


@dataclass(eq=False)
class _Folder:
    """A data set by folder, as DatasetCatalog holds it: calling it loads it."""

    name: str
    json_file: Path
    image_root: Path
    # Another json of the same name: a/b_c.json and a_b/c.json.
    rival: Path | None = None
    # Of the json as it was when last checked, with what it says about keypoints.
    stamp: tuple[Path, int, int] | None = None
    keypoints: dict[str, Any] = field(default_factory=dict)
    # The metadata that we have set, as opposed to the user.
    derived: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> list[dict[str, Any]]:
        if self.rival:
            raise UserError(
                f"data set '{self.name}' is ambiguous: both '{self.json_file}' and "
                f"'{self.rival}' have that name; rename one"
            )
        stamp = file_stamp(self.json_file)
        if stamp is None or stamp != self.stamp:
            try:
                categories = read_categories(self.json_file)
            except UserError as error:
                raise UserError(f"data set '{self.name}': {error}") from error
            self.keypoints = keypoint_metadata(categories)
            self.stamp = stamp
        return self._load()

    def is_stale(self) -> bool:
        """Whether the metadata is not that of the json as it lies on disk now."""
        return not self.derived or self.stamp != file_stamp(self.json_file)

    def publish(self) -> None:
        """Puts what is known without reading the json into the metadata."""
        metadata = MetadataCatalog.get(self.name)
        for key, value in (
            ("json_file", str(self.json_file)),
            ("image_root", str(self.image_root)),
        ):
            vars(metadata).pop(key, None)
            setattr(metadata, key, value)
        if not hasattr(metadata, "evaluator_type"):
            metadata.evaluator_type = "coco"
        if self.is_stale():
            self._retract(metadata)

    def _load(self) -> list[dict[str, Any]]:
        metadata = MetadataCatalog.get(self.name)
        self._retract(metadata)
        users = set(vars(metadata))
        try:
            records = load_coco_json(str(self.json_file), str(self.image_root), self.name)
            for key, value in self.keypoints.items():
                if key not in users:  # the user knows better
                    setattr(metadata, key, value)
        finally:
            values = vars(metadata)
            self.derived = {
                key: values[key] for key in _DERIVED if key in values and key not in users
            }
        for record in records:
            for annotation in record["annotations"]:
                _make_float(annotation)
        return records

    def _retract(self, metadata: Metadata) -> None:
        for key, value in self.derived.items():
            if vars(metadata).get(key) == value:
                delattr(metadata, key)
        self.derived = {}


# The data sets that we have registered.
_folders: dict[str, _Folder] = {}


def dataset_root() -> Path:
    """Where data sets lie: $DETECTRON2_DATASETS, else the folder ``datasets``, as in detectron2."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def register_folder_datasets(root: Path | None = None) -> list[str]:
    """Registers every ``NAME/SPLIT.json`` below a folder in detectron2's catalogs as NAME_SPLIT.

    No json is read before the data set is loaded. The images lie in ``NAME/SPLIT/`` if there is
    such a folder, else in ``NAME/images/``. Call it again whenever files have changed: a name found
    again follows its json, one whose json is gone is taken out of the catalogs, other roots' stay.
    Names that detectron2 or the user have registered are left alone. Hidden folders are skipped.

    Args:
        root: the folder, by default ``dataset_root()``. It need not exist.

    Returns:
        the names found below the root, sorted.
    """
    for name, folder in list(_folders.items()):
        if not _is_ours(name):
            del _folders[name]
        elif not folder.json_file.is_file():
            folder._retract(MetadataCatalog.get(name))
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
            del _folders[name]
    found: list[str] = []
    for json_file in _find_jsons(dataset_root() if root is None else root):
        name = f"{json_file.parent.name}_{json_file.stem}"
        if name in found:
            _folders[name].rival = json_file
            continue
        if name in DatasetCatalog and not _is_ours(name):
            logger.warning(f"'{json_file}' is not registered: '{name}' is registered already")
            continue
        split_folder = json_file.with_suffix("")
        images = split_folder if split_folder.is_dir() else json_file.parent / "images"
        folder = _folders.setdefault(name, _Folder(name, json_file, images))
        folder.json_file, folder.image_root, folder.rival = json_file, images, None
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, folder)
        folder.publish()
        found.append(name)
    return sorted(found)


def extend_catalogs() -> None:
    """Makes detectron2's catalogs register data sets by folder when asked for an unknown name.

    So ``DatasetCatalog.get("balloons_train")`` works after ``import mask_rcnn_plus``, and the
    import itself reads no folder. The catalogs have no hook for that, hence the replaced methods.
    A second call changes nothing.
    """
    for catalog in (type(DatasetCatalog), type(MetadataCatalog)):
        if not hasattr(catalog.get, "__wrapped__"):
            catalog.get = _registering(catalog.get)


def _registering(get: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(get)
    def get_or_register(self: Any, name: str) -> Any:
        if name not in self and name not in DatasetCatalog:
            register_folder_datasets()
        return get(self, name)

    return get_or_register


def use_json(name: str, json_file: Path) -> None:
    """Lets a registered COCO data set of any origin read another json of the same images.

    ``register_folder_datasets`` lets a data set by folder return to its own.

    Args:
        name: a data set whose metadata has ``image_root``.
        json_file: what it, and the evaluation through the metadata, shall read from now on.
    """
    image_root = Path(MetadataCatalog.get(name).image_root)
    if not _is_ours(name):
        DatasetCatalog.remove(name)
        _folders[name] = _Folder(name, json_file, image_root)
        DatasetCatalog.register(name, _folders[name])
        metadata = MetadataCatalog.get(name)
        for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            vars(metadata).pop(key, None)  # the new loader derives them
    _folders[name].json_file = json_file
    _folders[name].publish()


def is_by_folder(name: str) -> bool:
    """Whether it is a data set by folder, whose json is checked when it is loaded."""
    return _is_ours(name)


def is_stale(name: str) -> bool:
    """Whether it is a data set by folder whose metadata waits for its json to be loaded (again)."""
    return _is_ours(name) and _folders[name].is_stale()


def _is_ours(name: str) -> bool:
    return name in _folders and name in DatasetCatalog and DatasetCatalog[name] is _folders[name]


def _find_jsons(root: Path) -> list[Path]:
    """``root/*/*.json``, absolute and sorted, without hidden folders and files."""
    found: list[Path] = []
    for folder in _visible(root.absolute()):
        found += [path for path in _visible(folder) if path.suffix == ".json" and path.is_file()]
    return sorted(found)


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:  # no folder, or none that we may read
        return []


def _make_float(annotation: dict[str, Any]) -> None:
    """Turns whole numbers into floats in place: detectron2's resizing truncates where all are."""
    annotation["bbox"] = [float(value) for value in annotation["bbox"]]
    polygons = annotation.get("segmentation")
    if isinstance(polygons, list):
        annotation["segmentation"] = [[float(value) for value in polygon] for polygon in polygons]
