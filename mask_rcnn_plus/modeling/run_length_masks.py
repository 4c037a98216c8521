"""Masks that are run lengths from the start, such as those joined from an image's tiles."""

from collections.abc import Sequence
from typing import Any

import pycocotools.mask as mask_util
import torch
from torch import Tensor

from mask_rcnn_plus.modeling.masks_on_demand import MasksOnDemand


class RunLengthMasks(MasksOnDemand):
    """R masks of an image in COCO's run-length encoding.

    They have the methods of :class:`mask_rcnn_plus.modeling.PastedMasks`.

    Attributes:
        image_size: (H, W) in pixels.
    """

    def __init__(self, rles: Sequence[dict[str, Any]], image_size: tuple[int, int]) -> None:
        """
        Args:
            rles: R of ``{"size": [H, W], "counts": bytes}``.
            image_size: the attribute.

        Raises:
            ValueError: a mask is of another size.
        """
        self.image_size = (int(image_size[0]), int(image_size[1]))
        for rle in rles:
            if tuple(rle["size"]) != self.image_size:
                raise ValueError(f"a mask of {tuple(rle['size'])} in an image of {image_size}")
        self._rles = list(rles)

    def rle(self) -> list[dict[str, Any]]:
        """Each mask's encoding; do not change it in place."""
        return self._rles

    def to_tensor(self) -> Tensor:
        """All masks, bool (R, H, W), on the CPU."""
        if not self._rles:
            return torch.zeros((0, *self.image_size), dtype=torch.bool)
        return torch.stack(list(self))

    def _moved(self, *args: Any, **kwargs: Any) -> "RunLengthMasks":
        # Run lengths live on the CPU.
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self._rles)

    def _one(self, number: int) -> Tensor:
        return torch.from_numpy(mask_util.decode(self._rles[number])).bool()

    def _chosen(self, item: Any) -> "RunLengthMasks":
        item = item.cpu() if isinstance(item, Tensor) else item
        chosen = torch.arange(len(self))[item]
        return RunLengthMasks([self._rles[i] for i in chosen.tolist()], self.image_size)

    @staticmethod
    def cat(parts: Sequence["RunLengthMasks"]) -> "RunLengthMasks":
        """Masks of one image, one behind the other; for ``Instances.cat``."""
        return RunLengthMasks([rle for part in parts for rle in part.rle()], parts[0].image_size)
