"""detectron2's dataset mapper, and wrappers that name the image in errors or convert masks."""

from collections.abc import Callable, Mapping
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import DatasetMapper

from mask_rcnn_plus.data.formats import supported_only
from mask_rcnn_plus.data.outlines import mask_to_polygons
from mask_rcnn_plus.errors import UserError, reason


class SafeDatasetMapper(DatasetMapper):
    """detectron2's mapper for images of the supported formats only."""

    def __call__(self, dataset_dict: Mapping[str, Any]) -> Any:
        """Returns a sample in detectron2's format; raises a UserError for another image format."""
        keys = ("file_name", "sem_seg_file_name")
        with supported_only(*(dataset_dict[key] for key in keys if key in dataset_dict)):
            return super().__call__(dataset_dict)


class NamingMapper:
    """Wraps a mapper so that its errors name the image and have one line.

    Args:
        mapper: maps a record in detectron2's format to a sample, or to None to skip the image.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """Returns a sample; raises a UserError if the image or an annotation cannot be used."""
        try:
            return self._mapper(record)
        except UserError:
            raise
        except Exception as error:
            kind, text = type(error).__name__, reason(error, 300)
            raise UserError(
                f"image '{record.get('file_name', '?')}' cannot be used: "
                f"{kind}{': ' + text if text != kind else ''}"
            ) from error


class PolygonMapper:
    """Wraps a mapper that accepts only polygons: converts run lengths to the same masks."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """Returns the sample of a record, which does not change."""
        if any(isinstance(a.get("segmentation"), dict) for a in record.get("annotations", ())):
            annotations = [_with_polygons(annotation) for annotation in record["annotations"]]
            record = {**record, "annotations": annotations}
        return self._mapper(record)


def _with_polygons(annotation: dict[str, Any]) -> dict[str, Any]:
    # Crowds are not trained on, and their masks may fill the image.
    if not isinstance(annotation.get("segmentation"), dict) or annotation.get("iscrowd", 0):
        return annotation
    mask = mask_util.decode(annotation["segmentation"]).astype(bool)
    return {**annotation, "segmentation": mask_to_polygons(mask)}
