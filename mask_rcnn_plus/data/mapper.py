"""detectron2's dataset mapper, and wrappers that name the image in errors or convert masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pycocotools.mask as mask_util
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog

from mask_rcnn_plus.data.formats import supported_only
from mask_rcnn_plus.data.outlines import mask_to_polygons
from mask_rcnn_plus.errors import UserError, reason


class SafeDatasetMapper(DatasetMapper):
    """detectron2's mapper for images of the supported formats only.

    Objects without keypoints, beside others with keypoints, get keypoints that are not visible.

    Args:
        num_keypoints: of an object; 0 for a model without keypoints.
        **options: as in detectron2.
    """

    @configurable
    def __init__(self, *, num_keypoints: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._num_keypoints = num_keypoints

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The arguments that a config determines."""
        keypoints = cfg.MODEL.KEYPOINT_ON and is_train
        mirrored = keypoints and cfg.INPUT.RANDOM_FLIP == "horizontal"
        if mirrored:
            require_flip_map(cfg.DATASETS.TRAIN)
        # detectron2 would look for the flip map even if no image is mirrored.
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.KEYPOINT_ON = mirrored
        options = super().from_config(plain, is_train)
        if keypoints:
            options["use_keypoint"] = True
            options["num_keypoints"] = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        return options

    def __call__(self, dataset_dict: Mapping[str, Any]) -> Any:
        """Returns a sample in detectron2's format; raises a UserError for another image format."""
        if self._num_keypoints and "annotations" in dataset_dict:
            invisible = [0.0] * (3 * self._num_keypoints)
            annotations = [
                {**annotation, "keypoints": annotation.get("keypoints") or invisible}
                for annotation in dataset_dict["annotations"]
            ]
            dataset_dict = {**dataset_dict, "annotations": annotations}
        keys = ("file_name", "sem_seg_file_name")
        with supported_only(*(dataset_dict[key] for key in keys if key in dataset_dict)):
            return super().__call__(dataset_dict)


def require_flip_map(names: Sequence[str]) -> None:
    """Checks that data sets, which are loaded, say which keypoints swap in a mirrored image.

    Raises:
        UserError: the metadata of a data set has no ``keypoint_names`` or ``keypoint_flip_map``.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        points = metadata.get("keypoint_names")
        if not points:
            fault = "its categories have no list 'keypoints' of names, or different ones"
        elif metadata.get("keypoint_flip_map") is None:
            fault = f"{', '.join(points)} are not pairs such as left_eye and right_eye"
        else:
            continue
        raise UserError(
            f"data set '{name}' does not say which keypoints swap in a mirrored image ({fault}): "
            "rename them, or set INPUT.RANDOM_FLIP none"
        )


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
