"""Batches as tensors, numbers and text, so that a file of one can be read as safely as weights."""

from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from mask_rcnn_plus.errors import UserError

# The key that marks what a dictionary stands for.
_KIND = "__structure__"
_TENSORS = {"Boxes": Boxes, "BitMasks": BitMasks, "Keypoints": Keypoints}


def to_plain(value: Any) -> Any:
    """A batch without detectron2's structures.

    Args:
        value: lists and dictionaries of tensors, numbers, text and detectron2's structures. What is
            of another type is kept, and ``replay`` then asks for trust.
    """
    if isinstance(value, Instances):
        fields = {name: to_plain(field) for name, field in value.get_fields().items()}
        return {_KIND: "Instances", "size": list(value.image_size), "fields": fields}
    if isinstance(value, PolygonMasks):
        polygons = [[torch.as_tensor(one) for one in each] for each in value.polygons]
        return {_KIND: "PolygonMasks", "polygons": polygons}
    for name, kind in _TENSORS.items():
        if isinstance(value, kind):
            return {_KIND: name, "tensor": value.tensor}
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(one) for one in value]
    return value


def from_plain(value: Any) -> Any:
    """What ``to_plain`` was given, but for tuples, which are lists.

    Raises:
        UserError: it names a structure that there is none of.
    """
    if isinstance(value, list):
        return [from_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_plain(one) for key, one in value.items()}
    if kind == "Instances":
        height, width = value["size"]
        fields = {name: from_plain(field) for name, field in value["fields"].items()}
        return Instances((height, width), **fields)
    if kind == "PolygonMasks":
        return PolygonMasks([[one.numpy() for one in each] for each in value["polygons"]])
    if kind in _TENSORS:
        return _TENSORS[kind](value["tensor"])
    raise UserError(f"a batch has the structure {kind!r:.40}, which is none")
