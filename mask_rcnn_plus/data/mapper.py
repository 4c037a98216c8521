"""detectron2's dataset mapper with our pixels; wrappers that name the image or convert masks."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils, transforms

from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.data.outlines import mask_to_polygons
from mask_rcnn_plus.data.pixels import read_image
from mask_rcnn_plus.errors import UserError, reason


class SafeDatasetMapper(DatasetMapper):
    """detectron2's mapper, but images are read by ``read_image`` of ``pixels.py``.

    Args:
        is_train, options: as for DatasetMapper.
        sixteen_bit: as INPUT.SIXTEEN_BIT.
        max_pixels: as INPUT.MAX_PIXELS; sets Pillow's limit for the process when an image is read.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, sixteen_bit: str = "image", max_pixels: int = 0, **options: Any
    ) -> None:
        super().__init__(is_train, **options)
        self.sixteen_bit = sixteen_bit
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Arguments of the constructor for ``SafeDatasetMapper(cfg, ...)``."""
        return {
            **super().from_config(cfg, is_train),
            "sixteen_bit": cfg.INPUT.get("SIXTEEN_BIT", "image"),
            "max_pixels": cfg.INPUT.get("MAX_PIXELS", 0),
        }

    def __call__(self, dataset_dict: Mapping[str, Any]) -> Any:
        """Returns a sample in detectron2's format; raises a UserError for an unreadable image."""
        limit_pixels(self.max_pixels)  # here, because a loader's worker may be a new process
        sample: dict[str, Any] = copy.deepcopy(dict(dataset_dict))
        pixels = read_image(sample["file_name"], self.image_format, sixteen_bit=self.sixteen_bit)
        detection_utils.check_image_size(sample, pixels)
        semantic = None
        if "sem_seg_file_name" in sample:
            # Class ids, which must not be scaled.
            semantic = read_image(sample.pop("sem_seg_file_name"), "L", sixteen_bit="0..255")
            semantic = semantic[:, :, 0]
        seen = transforms.AugInput(pixels, sem_seg=semantic)
        changes = self.augmentations(seen)
        sample["image"] = torch.from_numpy(np.array(seen.image.transpose(2, 0, 1), order="C"))
        if seen.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(seen.sem_seg.astype(np.int64))
        size = seen.image.shape[:2]
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                sample, size, changes, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, changes, size)
        return sample


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
