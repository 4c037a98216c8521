"""PyTorch's .pth files, looked through before PyTorch reads them.

``weights_only=True`` keeps code from running, and not a small file from claiming all memory or all
time: records may be compressed, tensors may be views that repeat a few bytes, and tuples may be
nested so that hashing them never ends.
"""

import io
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mask_rcnn_plus.engine.plain_pickle import Built, PlainPickleError, PlainUnpickler

# Mask R-CNN with X-152 and its optimiser has 1.2 GB.
MOST_BYTES = 16 * 2**30
_MOST_RECORDS = 100_000
_MOST_PICKLE = 16 * 2**20  # 300 bytes a tensor
_END_OF_ARCHIVE = 22  # bytes of a zip file's last record, where it has no comment


def read_torch(path: Path, *, mapped: bool = False, also: Sequence[type] = ()) -> Any:
    """Reads what ``torch.save`` has written, tensors on the CPU.

    Args:
        path: of the file, a zip archive or one from before torch 1.6.
        mapped: leave the tensors in the file, for who wants only what lies beside them.
        also: plain classes, of attributes alone, that the file may hold.

    Raises:
        PlainPickleError: it holds anything but containers, tensors, strings and numbers, or is not
            as ``torch.save`` writes it.
        Exception: of any other kind where it is damaged.
    """
    if path.stat().st_size > MOST_BYTES:
        raise PlainPickleError(f"it is larger than {MOST_BYTES >> 30} GiB")
    archive = zipfile.is_zipfile(path)
    names = {**_NAMES, **{f"{one.__module__}.{one.__qualname__}": _made for one in also}}
    if archive:
        _check_archive(path, names)
    else:
        _check_legacy(path, names)
    with _numpy_numbers(), torch.serialization.safe_globals(list(also)), warnings.catch_warnings():
        # Of TorchScript's archives, which it then refuses.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive and mapped)


def _check_archive(path: Path, names: dict[str, Any]) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        # PyTorch has its own reader of zip files, and has to find the same table as this one.
        file.seek(-_END_OF_ARCHIVE, io.SEEK_END)
        if not file.read(4) == b"PK\5\6":
            raise PlainPickleError("it goes on after its end")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if len(records) > _MOST_RECORDS:
            raise PlainPickleError(f"it has more than {_MOST_RECORDS} records")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise PlainPickleError("its records are compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise PlainPickleError("its records are larger than the file")
        if len({record.filename.lower() for record in records}) < len(records):
            # PyTorch looks for names without regard to case, and may find the other one.
            raise PlainPickleError("it has two records of one name")
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise PlainPickleError(f"it has {len(pickles)} records data.pkl")
        if pickles[0].file_size > _MOST_PICKLE:
            raise PlainPickleError("its data.pkl is larger than any")
        content = archive.read(pickles[0])
    _look_through(io.BytesIO(content), len(content), size, names)


def _check_legacy(path: Path, names: dict[str, Any]) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        # A number that says what it is, a version, sizes, the object, the storages' keys.
        for _ in range(5):
            _look_through(file, size, size, names)


class _Inert(Built):
    """Stands for a tensor, a device and the like, which PyTorch will make."""

    def build(self, state: Any) -> None:
        pass


def _look_through(file: Any, size: int, file_size: int, names: dict[str, Any]) -> None:
    def storage(pid: Any) -> _Inert:
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or any(not isinstance(part, str) for part in (pid[0], pid[2], pid[3]))
            or type(pid[4]) is not int
            or not 0 <= pid[4] <= file_size
        ):
            raise PlainPickleError("it has a tensor that is larger than the file")
        view = pid[5] if len(pid) == 6 else None
        if view is not None and not (
            isinstance(view, tuple) and all(isinstance(part, str | int) for part in view)
        ):
            raise PlainPickleError("it has a tensor that is no tensor")
        return _Inert()

    PlainUnpickler(file, size, names, storage).load()


def _made(*_: Any) -> _Inert:
    return _Inert()


def _empty(*arguments: Any) -> dict[Any, Any]:
    if arguments and arguments != ({},) and not isinstance(arguments[0], dict):
        raise PlainPickleError("it has a dictionary that is none")
    return {}


# What checkpoints of detectron2, torchvision, timm and this project hold.
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": _empty,
    "collections.Counter": _empty,
    "_codecs.encode": _made,
    "numpy.core.multiarray.scalar": _made,
    "numpy.dtype": _made,
    "torch.Size": _made,
    "torch.device": _made,
    "torch._utils._rebuild_tensor": _made,
    "torch._utils._rebuild_tensor_v2": _made,
    "torch._utils._rebuild_parameter": _made,
    "torch._utils._rebuild_parameter_with_state": _made,
    "torch.storage.UntypedStorage": "storage",
}
for _name in (
    "Float",
    "Double",
    "Half",
    "BFloat16",
    "Long",
    "Int",
    "Short",
    "Char",
    "Byte",
    "Bool",
):
    _NAMES[f"torch.{_name}Storage"] = "storage"
for _name in (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int8",
    "uint8",
    "bool",
):
    _NAMES[f"torch.{_name}"] = "dtype"


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    """Lets PyTorch read numbers that NumPy has computed, such as a best AP."""
    scalar = getattr(np, "_core", None) or np.core
    dtypes = {type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")}
    allowed: list[Any] = [scalar.multiarray.scalar, np.dtype, *dtypes]
    # By the name of both NumPy 1 and 2, whichever wrote the file.
    allowed += [
        (scalar.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
    ]
    with torch.serialization.safe_globals(allowed):
        yield
