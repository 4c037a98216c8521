"""The model zoo's .pkl files: NumPy arrays by name, and nothing that runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from mask_rcnn_plus.engine.plain_pickle import Built, PlainPickleError, PlainUnpickler

_KINDS = "biuf"  # truth values, integers, floating point numbers
_MOST_AXES = 32


def read_arrays(path: Path) -> dict[str, Any]:
    """Reads a pickle of dictionaries, NumPy arrays, strings and numbers.

    NumPy takes no part in the reading: its pickles say type, shape and bytes, and arrays are made
    of these here once they agree.

    Args:
        path: of the file, of any pickle protocol, Python 2's included.

    Returns:
        what the file holds; its arrays, two levels deep at most, are writable ``np.ndarray``.

    Raises:
        PlainPickleError: it is no dictionary, names a class or function, holds arrays that are none
            of numbers or contradict themselves, or more of them than the file has bytes.
        Exception: of any other kind where it is no pickle at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        content = PlainUnpickler(file, size, _NAMES).load()
    if not isinstance(content, dict):
        raise PlainPickleError("it is no dictionary")
    # Several arrays may be made of the same few bytes.
    budget = _Budget(size)
    return {key: _resolved(value, budget, levels=1) for key, value in content.items()}


class _Budget:
    def __init__(self, size: int) -> None:
        self.left = size
        self.made: dict[int, np.ndarray] = {}


def _resolved(value: Any, budget: _Budget, levels: int) -> Any:
    if isinstance(value, dict) and levels:
        return {key: _resolved(one, budget, levels - 1) for key, one in value.items()}
    if not isinstance(value, _Array):
        return value
    if id(value) not in budget.made:
        array = value.view()
        budget.left -= array.nbytes
        if budget.left < 0:
            raise PlainPickleError("its arrays are larger than the file")
        # Writable, in this machine's byte order, and without the rest of the file behind it.
        budget.made[id(value)] = array.astype(array.dtype.newbyteorder("="), order="C")
    return budget.made[id(value)]


class _DType(Built):
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if not isinstance(code, str) or len(code) > 3 or code[:1] not in _KINDS:
            raise PlainPickleError("it has an array that is none of numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise PlainPickleError("it has an array of an unknown type")
        if any(part is not None for part in state[2:5]):
            raise PlainPickleError("it has an array that is none of numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(Built):
    """Stands for ``numpy.ndarray``, as it comes out of ``_reconstruct``."""

    def __init__(self, *_: Any) -> None:
        self._parts: tuple[Any, ...] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise PlainPickleError("it has an array without a state")
        shape, dtype, fortran, data = state[-4:]
        self.fill(data, dtype, shape, "F" if fortran is True or fortran == 1 else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Compares type, shape and bytes with each other."""
        if not isinstance(dtype, _DType):
            raise PlainPickleError("it has an array of an unknown type")
        if isinstance(data, str):  # of Python 2; see PlainUnpickler
            data = data.encode("latin1")
        if not isinstance(data, bytes):
            raise PlainPickleError("it has an array that is none of numbers")
        if (
            not isinstance(shape, tuple)
            or len(shape) > _MOST_AXES
            or any(type(side) is not int or side < 0 for side in shape)
            or math.prod(shape) * dtype.dtype.itemsize != len(data)
        ):
            raise PlainPickleError("it has an array whose shape and bytes contradict each other")
        self._parts = (data, dtype.dtype, shape, "F" if order == "F" else "C")

    def view(self) -> np.ndarray:
        """The array, read-only, over the bytes of the pickle."""
        if self._parts is None:
            raise PlainPickleError("it has an array without a state")
        data, dtype, shape, order = self._parts
        return np.frombuffer(data, dtype).reshape(shape, order=order)


def _from_buffer(
    data: Any = None, dtype: Any = None, shape: Any = None, order: Any = "C"
) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, order)
    return array


def _scalar(dtype: Any = None, data: Any = None) -> Any:
    array = _Array()
    array.fill(data, dtype, (), "C")
    return array.view().item()


def _encoded(text: Any = None, encoding: Any = None) -> bytes:
    # How protocols 0 to 2 write bytes.
    if not isinstance(text, str) or encoding != "latin1":
        raise PlainPickleError("it encodes what is no string of bytes")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    # How the same protocols write no bytes.
    if arguments:
        raise PlainPickleError("it makes bytes of something else")
    return b""


def _ordered(*arguments: Any) -> dict[str, Any]:
    pairs = arguments[0] if arguments else []
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in pairs
    ):
        raise PlainPickleError("it has a dictionary that is none")
    return dict(pairs)


_NAMES = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.ndarray": "numpy.ndarray",
    "numpy.dtype": _DType,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
}
