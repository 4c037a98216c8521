"""Data sets by folder: $DETECTRON2_DATASETS/NAME/SPLIT.json is the data set NAME_SPLIT."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.logger import log_first_n

from mask_rcnn_plus.data.coco_json import (
    Stamp,
    crowd_flag,
    file_stamp,
    keypoint_metadata,
    read_categories,
)
from mask_rcnn_plus.data.file_names import as_text, relative_name, resolve_names
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

# Metadata that follows from a json. detectron2's Metadata does not let a value change.
_DERIVED = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "keypoint_names",
    "keypoint_connection_rules",
    "keypoint_flip_map",
)


@dataclass(eq=False)
class _Folder:
    """A data set by folder. DatasetCatalog calls it to load it."""

    name: str
    json_file: Path
    image_root: Path
    # Another json that has the same name: a/b_c.json and a_b/c.json.
    rival: Path | None = None
    # The state of the json when it was last checked, and its categories.
    stamp: Stamp | None = None
    categories: list[dict[str, Any]] = field(default_factory=list)
    # The metadata that we have set, not the user: on registering, and from the json.
    published: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)
    # The file names of the json that were resolved when it was last loaded.
    renamed: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> list[dict[str, Any]]:
        if self.rival:
            raise UserError(
                f"data set '{self.name}' is ambiguous: both '{self.json_file}' and "
                f"'{self.rival}' have that name; rename one"
            )
        stamp = file_stamp(self.json_file)
        if stamp is None or stamp != self.stamp:
            try:
                self.categories = read_categories(self.json_file)
            except UserError as error:
                raise UserError(f"data set '{self.name}': {error}") from error
            self.stamp = stamp
        return self._load()

    def is_stale(self) -> bool:
        """Whether the metadata is missing or the json has changed since it was read."""
        return not self.derived or self.stamp != file_stamp(self.json_file)

    def publish(self) -> None:
        """Sets the metadata that is known without reading the json."""
        metadata = MetadataCatalog.get(self.name)
        self._retract(metadata, self.published)
        paths = {"json_file": str(self.json_file), "image_root": str(self.image_root)}
        vars(metadata).update(paths)
        self.published = dict(paths)
        if "evaluator_type" not in vars(metadata):
            metadata.evaluator_type = self.published["evaluator_type"] = "coco"
        if self.is_stale():
            self._retract(metadata, self.derived)

    def withdraw(self) -> None:
        """Unregisters the data set. Metadata that the user has set stays."""
        metadata = MetadataCatalog.get(self.name)
        self._retract(metadata, self.published)
        self._retract(metadata, self.derived)
        DatasetCatalog.remove(self.name)
        del _folders[self.name]

    def _load(self) -> list[dict[str, Any]]:
        metadata = MetadataCatalog.get(self.name)
        self._retract(metadata, self.derived)
        values = vars(metadata)
        set_by_user = set(values)
        try:
            records = load_coco_json(str(self.json_file), str(self.image_root), self.name)
            # CVAT lists the skeletons of all classes, also of those that are not used.
            used = {
                a["category_id"] for r in records for a in r["annotations"] if a.get("keypoints")
            }
            ordered = sorted(self.categories, key=lambda category: category["id"])
            categories = [ordered[index] for index in sorted(used)] or ordered
            for key, value in keypoint_metadata(categories).items():
                values.setdefault(key, value)  # the user's own value takes precedence
        finally:
            derived = values.keys() - set_by_user
            self.derived = {key: values[key] for key in _DERIVED if key in derived}
        self._resolve_files(records)
        for record in records:
            for annotation in record["annotations"]:
                _normalise(annotation)
        return records

    def _resolve_files(self, records: list[dict[str, Any]]) -> None:
        """Corrects the paths of images whose names differ from those of their files."""
        root = self.image_root
        names = [relative_name(record["file_name"], root) for record in records]
        found, _ = resolve_names(names, root)
        for record, name in zip(records, names, strict=True):
            if name in found:
                record["file_name"] = str(root / found[name])
        other = {name: as_text(path) for name, path in found.items() if as_text(path) != name}
        if other and other != self.renamed:
            name, path = next(iter(other.items()))
            logger.warning(
                f"Data set '{self.name}': {len(other)} of {len(names)} images have other names in "
                f"'{root}', the first is {path!r} for {name!r}; `mask-rcnn-plus check-data "
                f"{self.name}` lists them"
            )
        self.renamed = other

    @staticmethod
    def _retract(metadata: Metadata, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if vars(metadata).get(key) == value:
                delattr(metadata, key)
        values.clear()


# The data sets that this file has registered.
_folders: dict[str, _Folder] = {}


def dataset_root() -> Path:
    """The folder of the data sets: $DETECTRON2_DATASETS, else ``datasets``, as in detectron2."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def register_folder_datasets(root: Path | None = None) -> list[str]:
    """Registers every ``NAME/SPLIT.json`` below a folder in detectron2's catalogs as NAME_SPLIT.

    No json is read before the data set is loaded. The images are in ``NAME/SPLIT/`` if that folder
    exists, else in ``NAME/images/``. Call it again when files have changed: it updates the paths of
    a known name, and removes names whose json was deleted. Names from other roots stay. Names that
    detectron2 or the user have registered are never changed. Hidden folders are skipped.

    Args:
        root: the folder, by default ``dataset_root()``; it may be missing.

    Returns:
        the names of the data sets below the root, sorted.
    """
    for name, folder in list(_folders.items()):
        if not is_by_folder(name):
            del _folders[name]
        elif not os.path.isfile(folder.json_file):  # noqa: PTH113
            folder.withdraw()
            MetadataCatalog.remove(name)
    names: list[str] = []
    root = dataset_root() if root is None else root
    json_files = root.absolute().glob("[!.]*/[!.]*.json")
    # Unlike Path.is_file, os.path.isfile is False in a folder that this user may not enter.
    for json_file in sorted(path for path in json_files if os.path.isfile(path)):  # noqa: PTH113
        name = f"{json_file.parent.name}_{json_file.stem}"
        if name in names:
            _folders[name].rival = json_file
            continue
        if name in DatasetCatalog and not is_by_folder(name):
            message = f"'{json_file}' is not registered: '{name}' is registered already"
            log_first_n(logging.WARNING, message, key="message")
            continue
        split_folder = json_file.with_suffix("")
        images = split_folder if split_folder.is_dir() else json_file.parent / "images"
        folder = _folders.setdefault(name, _Folder(name, json_file, images))
        folder.json_file, folder.image_root, folder.rival = json_file, images, None
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, folder)
        folder.publish()
        names.append(name)
    return sorted(names)


def extend_catalogs() -> None:
    """Makes detectron2's catalogs register data sets by folder at the first unknown name.

    So ``DatasetCatalog.get("balloons_train")`` works after ``import mask_rcnn_plus``, as does
    ``[...]``, and the import itself reads no folder. ``in`` stays as it is: ``register`` uses it.
    ``register`` accepts the name of a data set by folder, which it replaces.
    The methods are replaced because the catalogs have no hook. A second call changes nothing.
    """
    for catalog in (type(DatasetCatalog), type(MetadataCatalog)):
        if not hasattr(catalog.get, "__wrapped__"):
            for method in ("get", "__getitem__"):
                setattr(catalog, method, _registering(getattr(catalog, method)))
    catalog = type(DatasetCatalog)
    if not hasattr(catalog.register, "__wrapped__"):
        catalog.register = _replacing(catalog.register)


def _registering(lookup: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(lookup)
    def look_up_or_register(self: Any, name: str) -> Any:
        if name not in self and name not in DatasetCatalog:
            register_folder_datasets()
        return lookup(self, name)

    return look_up_or_register


def _replacing(register: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    @functools.wraps(register)
    def register_or_replace(self: Any, name: str, func: Callable[[], Any]) -> None:
        if is_by_folder(name) and func is not _folders[name]:
            _folders[name].withdraw()
        register(self, name, func)

    return register_or_replace


def use_json(name: str, json_file: Path) -> None:
    """Makes a registered COCO data set read another json of the same images.

    ``register_folder_datasets`` undoes this for a data set by folder.

    Args:
        name: a data set of any origin whose metadata has ``image_root``.
        json_file: the json that loading and evaluation read from now on.
    """
    image_root = Path(MetadataCatalog.get(name).image_root)
    if not is_by_folder(name):
        DatasetCatalog.remove(name)
        _folders[name] = _Folder(name, json_file, image_root)
        DatasetCatalog.register(name, _folders[name])
        metadata = MetadataCatalog.get(name)
        for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            vars(metadata).pop(key, None)  # the new loader derives them
    _folders[name].json_file = json_file
    _folders[name].publish()


def is_by_folder(name: str) -> bool:
    """Whether a data set is registered by folder, so that loading it checks its json."""
    return name in _folders and name in DatasetCatalog and DatasetCatalog[name] is _folders[name]


def is_stale(name: str) -> bool:
    """Whether a data set by folder must be loaded (again) before its metadata is right."""
    return is_by_folder(name) and _folders[name].is_stale()


def _normalise(annotation: dict[str, Any]) -> None:
    """Changes values in place that detectron2 would misunderstand.

    Its resizing truncates lists of integers, and it takes ``iscrowd`` null for a crowd.
    """
    annotation["iscrowd"] = crowd_flag(annotation.get("iscrowd"))
    annotation["bbox"] = [float(value) for value in annotation["bbox"]]
    polygons = annotation.get("segmentation")
    if isinstance(polygons, list):
        annotation["segmentation"] = [[float(value) for value in polygon] for polygon in polygons]
