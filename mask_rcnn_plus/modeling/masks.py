"""Masks of an image that need no memory for its pixels: mask-head output or run lengths."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from detectron2.layers import paste_masks_in_image
from torch import Tensor

from mask_rcnn_plus.ops import paste_masks_rle


class ImageMasks(ABC):
    """R masks of an image, instead of a bool tensor (R, H, W) in ``Instances.pred_masks``.

    :meth:`rle`, iteration and indices that choose whole masks create no (R, H, W) tensor.
    :meth:`to_tensor` does, and so do :meth:`numpy`, :meth:`sum`, indices such as ``[:, 10:20]``,
    operators (``|``, ``==``, ``*``, ...) and torch's functions (``torch.cat``, ``torch.any``, ...).
    For other methods of tensors, and to change pixels, call :meth:`to_tensor` first.

    Attributes:
        image_size: (H, W) in pixels.
    """

    image_size: tuple[int, int]

    @abstractmethod
    def rle(self) -> list[dict[str, Any]]:
        """COCO's run-length encoding of each mask: ``{"size": [H, W], "counts": bytes}``.

        Do not change it in place.
        """

    @abstractmethod
    def to_tensor(self) -> Tensor:
        """All masks, bool (R, H, W)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def _decode(self, index: int) -> Tensor:
        """One mask, bool (H, W); ``index`` is 0 to R - 1."""

    @abstractmethod
    def _select(self, item: Any) -> "ImageMasks":
        """The masks that a slice, or numbers or bools in a list, array or tensor choose."""

    @abstractmethod
    def _move(self, *args: Any, **kwargs: Any) -> "ImageMasks": ...

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The masks on another device; with a dtype, memory format or tensor, ``to_tensor().to``.

        The arguments are those of ``torch.Tensor.to``.
        """
        values = [*args, *kwargs.values()]
        if any(isinstance(v, torch.dtype | torch.memory_format | Tensor) for v in values):
            return self.to_tensor().to(*args, **kwargs)
        return self._move(*args, **kwargs)

    def cpu(self) -> Any:
        return self.to("cpu")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.image_size))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 3

    def __getitem__(self, item: Any) -> Any:
        """One mask, bool (H, W), for a number; the chosen masks for a slice, list or 1D tensor.

        Any other index (a tuple, ``...``, ``None``) is applied to :meth:`to_tensor`.

        Raises:
            IndexError: a number outside -R to R - 1.
        """
        if isinstance(item, int) or getattr(item, "ndim", None) == 0:
            index = operator.index(item)
            if not -len(self) <= index < len(self):
                raise IndexError(f"mask {index} is out of range for {len(self)} masks")
            return self._decode(index % len(self))
        whole_masks = isinstance(item, slice | list) or getattr(item, "ndim", 0) == 1
        return self._select(item) if whole_masks else self.to_tensor()[item]

    def __iter__(self) -> Iterator[Tensor]:
        return (self._decode(i) for i in range(len(self)))

    def sum(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``torch.Tensor.sum``; ``sum(dim=(1, 2))`` is the area of each mask in pixels."""
        return self.to_tensor().sum(*args, **kwargs)

    def numpy(self) -> npt.NDArray[Any]:
        return self.to_tensor().numpy()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_dense(args), **_dense(kwargs or {}))

    # torch.as_tensor, and so BitMasks, do not ask __torch_function__.
    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.to_tensor().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.to_tensor().__dlpack_device__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.to_tensor().cpu().numpy().astype(dtype or np.bool_, copy=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)})"


def _dense(value: Any) -> Any:
    """The arguments of a function of torch, with tensors in place of masks."""
    if isinstance(value, ImageMasks):
        return value.to_tensor()
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return type(value)(map(_dense, value)) if type(value) in (list, tuple) else value


def _add_operator(name: str) -> None:
    def apply(self: ImageMasks, *others: Any) -> Any:
        return getattr(self.to_tensor(), name)(*map(_dense, others))

    setattr(ImageMasks, name, apply)


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "invert", "neg", "abs"):
    _add_operator(f"__{_name}__")
for _name in ("and", "or", "xor", "add", "sub", "mul", "truediv"):
    _add_operator(f"__{_name}__")
    _add_operator(f"__r{_name}__")


class PastedMasks(ImageMasks):
    """R masks as they come from the mask head: small squares and the boxes to paste them into.

    :meth:`rle` encodes them without a bitmap of the image. The pixels are those of detectron2's
    ``paste_masks_in_image``; iteration and a number as index paste one mask at a time.

    Attributes:
        masks: (R, M, M), fp32.
        boxes: (R, 4), rows of (x0, y0, x1, y1) in pixels of the image.
        threshold: a pixel belongs to the object where the mask reaches this value.
    """

    def __init__(
        self, masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
    ) -> None:
        """
        Args:
            masks: (R, M, M); fp16 and bf16 are converted to fp32, since detectron2 would round the
                sampled positions to the masks' dtype.
            boxes, image_size, threshold: the attributes.

        Raises:
            ValueError: the numbers of boxes and masks differ.
        """
        if len(masks) != len(boxes):
            raise ValueError(f"expected {len(masks)} boxes, one per mask, got {len(boxes)}")
        self.masks, self.boxes = masks.float(), boxes
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.threshold = threshold
        self._rle: list[dict[str, Any]] | None = None

    def rle(self) -> list[dict[str, Any]]:
        """On the CPU it equals, byte for byte, the encoding of :meth:`to_tensor`."""
        if self._rle is None:
            self._rle = paste_masks_rle(self.masks, self.boxes, self.image_size, self.threshold)
        return self._rle

    def to_tensor(self) -> Tensor:
        """All masks, bool (R, H, W), on the device of ``masks``; pasted by detectron2."""
        if len(self) == 0:
            return self.masks.new_zeros((0, *self.image_size), dtype=torch.bool)
        return paste_masks_in_image(self.masks, self.boxes, self.image_size, self.threshold)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def device(self) -> torch.device:
        return self.masks.device

    def _decode(self, index: int) -> Tensor:
        return self._select(slice(index, index + 1)).to_tensor()[0]

    def _select(self, item: Any) -> "PastedMasks":
        return PastedMasks(self.masks[item], self.boxes[item], self.image_size, self.threshold)

    def _move(self, *args: Any, **kwargs: Any) -> "PastedMasks":
        masks, boxes = self.masks.to(*args, **kwargs), self.boxes.to(*args, **kwargs)
        if masks is self.masks and boxes is self.boxes:
            return self
        return PastedMasks(masks, boxes, self.image_size, self.threshold)

    @staticmethod
    def cat(parts: Sequence["PastedMasks"]) -> "PastedMasks":
        """The masks of all parts, which belong to one image; for ``Instances.cat``.

        Raises:
            ValueError: the image sizes or thresholds differ.
        """
        kinds = {(part.image_size, part.threshold) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"cannot join masks that differ in (image size, threshold): {kinds}")
        masks = torch.cat([part.masks for part in parts])
        return PastedMasks(masks, torch.cat([part.boxes for part in parts]), *kinds.pop())

    def __repr__(self) -> str:
        return f"PastedMasks(shape={tuple(self.shape)}, masks of {tuple(self.masks.shape[1:])})"


class RunLengthMasks(ImageMasks):
    """R masks in COCO's run-length encoding, such as those joined from an image's tiles.

    They are always on the CPU.
    """

    def __init__(self, rles: Sequence[dict[str, Any]], image_size: tuple[int, int]) -> None:
        """
        Args:
            rles: R of ``{"size": [H, W], "counts": bytes}``.
            image_size: (H, W) in pixels.

        Raises:
            ValueError: a mask has another size.
        """
        self.image_size = (int(image_size[0]), int(image_size[1]))
        for rle in rles:
            if tuple(rle["size"]) != self.image_size:
                raise ValueError(f"expected masks of {image_size}, got one of {tuple(rle['size'])}")
        self._rles = list(rles)

    def rle(self) -> list[dict[str, Any]]:
        return self._rles

    def to_tensor(self) -> Tensor:
        if not self._rles:
            return torch.zeros((0, *self.image_size), dtype=torch.bool)
        return torch.stack(list(self))

    def __len__(self) -> int:
        return len(self._rles)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _decode(self, index: int) -> Tensor:
        return torch.from_numpy(mask_util.decode(self._rles[index])).bool()

    def _select(self, item: Any) -> "RunLengthMasks":
        item = item.cpu() if isinstance(item, Tensor) else item
        indices = torch.arange(len(self))[item]
        return RunLengthMasks([self._rles[i] for i in indices.tolist()], self.image_size)

    def _move(self, *args: Any, **kwargs: Any) -> "RunLengthMasks":
        return self

    @staticmethod
    def cat(parts: Sequence["RunLengthMasks"]) -> "RunLengthMasks":
        """The masks of all parts, which belong to one image; for ``Instances.cat``."""
        return RunLengthMasks([rle for part in parts for rle in part.rle()], parts[0].image_size)
