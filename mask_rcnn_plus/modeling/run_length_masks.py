"""Masks that are run lengths from the start, such as those joined from an image's tiles."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from torch import Tensor


class RunLengthMasks:
    """R masks of an image in COCO's run-length encoding.

    Takes the place of a bool tensor (R, H, W) in ``Instances.pred_masks``, as
    :class:`mask_rcnn_plus.modeling.PastedMasks` does: the two have the same methods.

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

    def to(self, *args: Any, **kwargs: Any) -> "RunLengthMasks":
        """Itself: run lengths live on the CPU."""
        return self

    @property
    def shape(self) -> torch.Size:
        """(R, H, W)."""
        return torch.Size((len(self), *self.image_size))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self._rles)

    def __getitem__(self, item: Any) -> Any:
        """One mask, bool (H, W), for a number; else, as a tensor is indexed, those chosen."""
        if isinstance(item, int | np.integer):
            return torch.from_numpy(mask_util.decode(self._rles[item])).bool()
        item = item.cpu() if isinstance(item, Tensor) else item
        chosen = torch.arange(len(self))[item]
        return RunLengthMasks([self._rles[i] for i in chosen.tolist()], self.image_size)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.to_tensor().numpy().astype(dtype or np.bool_, copy=False)

    @staticmethod
    def cat(parts: Sequence["RunLengthMasks"]) -> "RunLengthMasks":
        """Masks of one image, one behind the other; for ``Instances.cat``."""
        return RunLengthMasks([rle for part in parts for rle in part.rle()], parts[0].image_size)

    def __repr__(self) -> str:
        return f"RunLengthMasks(shape={tuple(self.shape)})"
