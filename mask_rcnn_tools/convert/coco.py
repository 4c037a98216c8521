"""Reads COCO jsons of labelling tools. The images may be anywhere in the source.

Known layouts:

- Roboflow: ``train/_annotations.coco.json`` beside the images, also ``valid`` and ``test``
- CVAT: ``annotations/instances_default.json`` (or ``instances_Train.json``) and ``images``
- COCO: ``annotations/instances_train2017.json`` and ``train2017``
- Label Studio: ``result.json`` and ``images``
- FiftyOne: ``labels.json`` and ``data``

Polygons, RLE, boxes of objects without a mask, iscrowd, keypoints and valid ids are kept. The box
and the area of an object with a mask are computed from the mask.
"""

import math
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from mask_rcnn_plus.data.coco_json import is_names, lenient_flag, outline_fault
from mask_rcnn_plus.data.mask_rules import are_numbers, is_number, rle_fault
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.annotations import brush_masks
from mask_rcnn_tools.check.forms import to_coco, to_polygon
from mask_rcnn_tools.convert.classes import clean_name
from mask_rcnn_tools.convert.geometry import InvalidShape, clip, polygon, rectangle, to_number
from mask_rcnn_tools.convert.images import NamedImages
from mask_rcnn_tools.convert.labels import (
    LabelledImage,
    LabelledObject,
    Labels,
    files_below,
    keep_splits,
    read_each,
    read_json,
    split_of,
    unknown_layout,
)
from mask_rcnn_tools.progress import progress_bar

_LOOKED_FOR = (
    "a COCO json: train/_annotations.coco.json (Roboflow), annotations/instances_*.json (CVAT, "
    "COCO), result.json (Label Studio), labels.json (FiftyOne), or any other .json"
)


def read(source: Path, *, images: Path | None = None) -> Labels:
    """Reads a COCO json, or all COCO jsons in a folder and its subfolders.

    If the source has several splits, the name of a json, or of its folder, is the split of its
    images. Categories with the same name are one class.

    Args:
        source: the folder or json.
        images: the folder of the images, by default the source.

    Raises:
        UserError: there is no COCO json.
    """
    reader = _Reader(Labels(), source, images)
    paths = files_below(source, ".json")
    # COCO publishes keypoints and captions of the same images in files beside these.
    instances = {path.parent for path in paths if path.name.startswith("instances_")}
    beside = [
        path
        for path in paths
        if path.parent in instances and not path.name.startswith("instances_")
    ]
    for path in beside:
        reader.labels.note("json files beside instances_*.json are left out", path)
    wanted = (path for path in paths if path not in beside)
    found = 0
    for path, content in read_each(read_json, wanted, source, reader.labels):
        if fault := outline_fault(content):
            if path == source:
                raise UserError(f"'{path}' is not in COCO format: {fault}")
            reader.labels.note(
                "json files that are not in COCO format are left out", f"{path}: {fault}"
            )
            continue
        found += 1
        reader.read(path, content)
    if not found:
        raise unknown_layout(source, _LOOKED_FOR)
    reader.images.report_rest(paths)
    return reader.finish()


class _Reader:
    """Reads the jsons of a source one after another."""

    def __init__(self, labels: Labels, source: Path, images: Path | None) -> None:
        self.labels = labels
        self.images = NamedImages(source, images, labels)
        # Objects without a mask: (image, object, place in the json).
        self._boxes: list[tuple[LabelledImage, LabelledObject, str]] = []

    def read(self, path: Path, content: dict[str, Any]) -> None:
        """Adds the images and objects of a json with COCO's outline."""
        names = self._read_categories(path, content["categories"])
        images = self._read_images(path, content["images"])
        brushes = brush_masks([e if isinstance(e, dict) else {} for e in content["annotations"]])
        entries = progress_bar(f"reading {path.name}", "annotation", content["annotations"])
        for index, entry in enumerate(entries):
            where = f"{path}: annotations[{index}]"
            image_id, category_id = (
                str(entry.get(key)) if isinstance(entry, dict) else ""
                for key in ("image_id", "category_id")
            )
            if image_id not in images or category_id not in names:
                self.labels.skip("annotations have an unknown image_id or category_id", where)
                continue
            if (image := images[image_id]) is None:  # already skipped
                continue
            try:
                self._add(entry, image, names[category_id], where, index in brushes)
            except InvalidShape as error:
                self.labels.skip("annotations are invalid", f"{where} {error}")

    def finish(self) -> Labels:
        """The labels of all jsons."""
        labels = self.labels
        has_masks = any(image.objects for image in labels.images)
        for image, labelled, where in self._boxes:
            if has_masks:
                labels.skip("annotations have no mask, although other annotations have one", where)
            else:
                image.objects.append(labelled)
        if self._boxes and not has_masks:
            labels.note("annotations are boxes without a mask", f"{len(self._boxes)} annotations")
        keep_splits(labels)
        used = {clean_name(o.label) for image in labels.images for o in image.objects}
        # Roboflow adds a category without objects: the supercategory of the others.
        parents = {
            fields.get("supercategory", "")
            for name, fields in labels.categories.items()
            if fields.get("supercategory") != name
        }
        for name in sorted((parents & labels.categories.keys()) - used):
            labels.note(
                "categories that have no objects and only group others are left out", f"'{name}'"
            )
            del labels.categories[name]
        ids = {name: fields["id"] for name, fields in labels.categories.items()}
        labels.classes = sorted(ids, key=lambda n: ids[n] if type(ids[n]) is int else math.inf)
        return labels

    def _read_categories(self, path: Path, entries: list[Any]) -> dict[str, str]:
        """The class of each category id."""
        names: dict[str, str] = {}
        for index, entry in enumerate(entries):
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name.strip():
                self.labels.skip("categories have no name", f"{path}: categories[{index}]")
                continue
            names[str(entry.get("id"))] = name
            self.labels.categories.setdefault(clean_name(name), _category_fields(entry))
        return names

    def _read_images(self, path: Path, entries: list[Any]) -> dict[str, LabelledImage | None]:
        """The image of each id; None if it is skipped."""
        images: dict[str, LabelledImage | None] = {}
        near = self._image_folder(path, entries)
        split = split_of(path.stem, path.parent.name)
        for index, entry in enumerate(entries):
            name = entry.get("file_name") if isinstance(entry, dict) else None
            where = f"{path}: images[{index}]"
            if not isinstance(name, str):
                self.labels.skip("images have no file_name", where)
                continue
            if (key := str(entry.get("id"))) in images:
                self.labels.skip("images have the id of an earlier image", f"{where} '{name}'")
                continue
            size = entry.get("width"), entry.get("height")
            images[key] = image = self.images.open_named(name, path, near, size=size)
            if image is not None:
                image.id, image.split = entry.get("id"), split
                self.labels.images.append(image)
        return images

    def _image_folder(self, path: Path, entries: list[Any]) -> Path:
        """The folder that the file names of a json are probably relative to."""
        split = path.stem.split("_")[-1]  # instances_train2017
        tops = [p for p in (path.parent, path.parent.parent) if p.is_relative_to(self.images.top)]
        folders = [
            (top / sub).resolve()
            for top in (*tops, self.images.top)
            for sub in (split, f"images/{split}", "images", "data", "")
            if (top / sub).is_dir()
        ]
        names = [entry.get("file_name") for entry in entries[:20] if isinstance(entry, dict)]
        return next((folder for folder in folders if _has_file(folder, names)), folders[0])

    def _add(
        self, entry: dict[str, Any], image: LabelledImage, label: str, where: str, is_brush: bool
    ) -> None:
        """Adds an annotation to its image."""
        labelled = LabelledObject(label, fields={"id": entry.get("id")})
        segmentation = to_coco(entry.get("segmentation")) or entry.get("segmentation")
        if isinstance(segmentation, dict) and segmentation:
            labelled.rle = _compress(segmentation, image)
        elif segmentation:
            labelled.polygons, faults = _polygons(segmentation)
            for fault in faults:
                what = "polygons are invalid; the valid polygons of the object are kept"
                self.labels.skip(what, f"{where} {fault}")
        else:
            labelled.fields |= _box(entry.get("bbox"), image)
            self._boxes.append((image, labelled, where))
        crowd = any(lenient_flag(entry.get(key)) for key in ("iscrowd", "ignore"))
        if is_brush:
            self.labels.note(
                "brush masks, which CVAT's export marks iscrowd: 1, become ordinary objects", where
            )
            crowd = False
        labelled.fields["iscrowd"] = int(crowd)
        if keypoints := entry.get("keypoints"):
            names = self.labels.categories[clean_name(label)].get("keypoints", [])
            if are_numbers(keypoints, 3 * len(names)) and all(map(is_number, keypoints)):
                found = sum(value > 0 for value in keypoints[2::3])
                labelled.fields |= {"keypoints": keypoints, "num_keypoints": found}
            else:
                what = "keypoints are not x, y, visibility for each keypoint name of the category"
                self.labels.skip(what, where)
        if segmentation:
            image.objects.append(labelled)


def _category_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of a category that the new json keeps."""
    fields = {"id": entry.get("id")}
    if isinstance(entry.get("supercategory"), str):
        fields["supercategory"] = entry["supercategory"]
    if is_names(entry.get("keypoints")):
        fields["keypoints"] = entry["keypoints"]
        links = entry.get("skeleton")
        if isinstance(links, list) and all(map(are_numbers, links)):
            fields["skeleton"] = links
    return fields


def _has_file(folder: Path, names: list[Any]) -> bool:
    try:
        return any(isinstance(name, str) and (folder / name).is_file() for name in names)
    except (OSError, ValueError):  # too long, a NUL
        return False


def _compress(rle: dict[str, Any], image: LabelledImage) -> dict[str, Any]:
    """COCO's compressed run lengths."""
    size = [image.height, image.width]
    if fault := rle_fault(rle, size):
        raise InvalidShape(fault)
    counts = rle["counts"]
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()
    return {"size": size, "counts": counts}


def _polygons(segmentation: Any) -> tuple[list[list[float]], list[InvalidShape]]:
    """The valid polygons of a segmentation, at least one, and the faults of the others."""
    if not isinstance(segmentation, list):
        raise InvalidShape("has a segmentation that is neither polygons nor an RLE")
    polygons, faults = [], []
    for part in segmentation:
        part = to_polygon(part) or part
        try:
            if are_numbers(part):
                part = [part[i : i + 2] for i in range(0, len(part), 2)]
            polygons.append(polygon(part))
        except InvalidShape as fault:
            faults.append(fault)
    if not polygons:
        raise faults[0]
    return polygons, faults


def _box(box: Any, image: LabelledImage) -> dict[str, Any]:
    """The bbox, clipped to the image, and its area."""
    if not isinstance(box, list) or len(box) != 4:
        raise InvalidShape("has neither a mask nor a bbox [x, y, width, height]")
    x, y, width, height = map(to_number, box)
    corners = clip(rectangle(x, y, x + width, y + height), image.width, image.height)
    if width <= 0 or height <= 0 or not corners:
        raise InvalidShape(f"has the bbox {box}, which covers no pixel of its image")
    xs, ys = corners[::2], corners[1::2]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return {"bbox": [min(xs), min(ys), width, height], "area": width * height}
