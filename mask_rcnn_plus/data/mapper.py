"""What stands around detectron2's mapper: errors that name the image, polygons for run lengths."""

from collections.abc import Callable
from typing import Any

import pycocotools.mask as mask_util

from mask_rcnn_plus.data.outlines import mask_to_polygons
from mask_rcnn_plus.errors import UserError


class NamingMapper:
    """A mapper around detectron2's, whose errors name the image and come as one line.

    Args:
        mapper: takes a record in detectron2's format and returns a sample, or None to skip it.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """The sample.

        Args:
            record: of one image; ``file_name`` is its path.

        Raises:
            UserError: the image cannot be read or is not what the record says, or an annotation
                cannot be used.
        """
        try:
            return self._mapper(record)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"image '{record.get('file_name', '?')}' cannot be used: "
                f"{type(error).__name__}{': ' if reason else ''}{reason}"
            ) from error


class PolygonMapper:
    """A mapper around detectron2's that gives it polygons where the data set has run lengths.

    The polygons run along pixel edges, and pycocotools turns them back into the very mask.

    Args:
        mapper: as in ``NamingMapper``, one that takes polygons alone.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """The sample.

        Args:
            record: of one image; it is not changed.
        """
        if any(isinstance(a.get("segmentation"), dict) for a in record.get("annotations", ())):
            annotations = [_with_polygons(annotation) for annotation in record["annotations"]]
            record = {**record, "annotations": annotations}
        return self._mapper(record)


def _with_polygons(annotation: dict[str, Any]) -> dict[str, Any]:
    # A crowd is not trained on, and its mask may fill the image.
    if not isinstance(annotation.get("segmentation"), dict) or annotation.get("iscrowd", 0):
        return annotation
    mask = mask_util.decode(annotation["segmentation"]).astype(bool)
    return {**annotation, "segmentation": mask_to_polygons(mask)}
