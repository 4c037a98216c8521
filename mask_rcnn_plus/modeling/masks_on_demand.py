"""Masks that become a tensor when somebody asks for one."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class MasksOnDemand(ABC):
    """Takes the place of a bool tensor (R, H, W) in ``Instances.pred_masks``.

    Whole masks are chosen without making any. What else a tensor can do (``cpu().numpy()``,
    ``sum()``, ``masks[:, 10:20]``, ``to(torch.uint8)``) is done by :meth:`to_tensor`'s, of all R.

    Attributes:
        image_size: (H, W) in pixels.
    """

    image_size: tuple[int, int]

    @abstractmethod
    def to_tensor(self) -> Tensor:
        """All masks, bool (R, H, W)."""

    @abstractmethod
    def _moved(self, *args: Any, **kwargs: Any) -> Any:
        """The same on another device."""

    @abstractmethod
    def _one(self, number: int) -> Tensor:
        """A mask, bool (H, W); ``number`` from 0 to R - 1."""

    @abstractmethod
    def _chosen(self, item: Any) -> Any:
        """Those that a slice, or numbers or bools in a list, an array or a tensor choose."""

    @abstractmethod
    def __len__(self) -> int: ...

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same on another device; of another dtype or memory format, a tensor."""
        asked = [*args, *kwargs.values()]
        if any(isinstance(one, torch.dtype | torch.memory_format | Tensor) for one in asked):
            return self.to_tensor().to(*args, **kwargs)
        return self._moved(*args, **kwargs)

    def cpu(self) -> Any:
        """The same on the CPU."""
        return self.to("cpu")

    @property
    def shape(self) -> torch.Size:
        """(R, H, W)."""
        return torch.Size((len(self), *self.image_size))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def __getitem__(self, item: Any) -> Any:
        """One mask, bool (H, W), for a number; else, as a tensor is indexed, those chosen.

        Raises:
            IndexError: there is no such mask.
        """
        if isinstance(item, int) or getattr(item, "ndim", None) == 0:
            number = operator.index(item)
            if not -len(self) <= number < len(self):
                raise IndexError(f"mask {number} of {len(self)}")
            return self._one(number % len(self))
        whole = isinstance(item, slice | list) or getattr(item, "ndim", 0) == 1
        return self._chosen(item) if whole else self.to_tensor()[item]

    def __iter__(self) -> Iterator[Tensor]:
        return (self._one(i) for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.to_tensor().cpu().numpy().astype(dtype or np.bool_, copy=False)

    def __getattr__(self, name: str) -> Any:
        # Not what copying and pickling look for, on an object that has no attributes yet.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self.to_tensor(), name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)})"
