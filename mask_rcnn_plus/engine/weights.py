"""Reads weights files as data: they may come from an untrusted source, so no code in them runs."""

import codecs
import logging
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from mask_rcnn_plus.engine import downloads  # noqa: F401  (registers itself)
from mask_rcnn_plus.engine.arguments import TRUST_FLAG
from mask_rcnn_plus.engine.package_weights import PREFIX, is_efficientnet, package_file, to_timm
from mask_rcnn_plus.errors import UserError, did_you_mean_file, reason

logger = logging.getLogger(__name__)

# Far more than any data set has.
_MAX_CLASSES, _MAX_CLASS_NAME = 100_000, 1000


class BadFileError(Exception):
    """A file has invalid content; the message says why."""


class UnsafePickleError(BadFileError):
    """A pickle names a class or function that weights do not need."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the file names '{name[:100]}', which may run code")


def local_weights(weights: str) -> Path:
    """The local file of some weights; a remote file is downloaded into iopath's cache.

    Args:
        weights: a file, a URL, a ``detectron2://`` name, or ``package://`` and the name of a Python
            package (see ``package_weights``).

    Raises:
        UserError: the file does not exist or cannot be downloaded.
    """
    if weights.startswith(PREFIX):
        return package_file(weights)
    if "://" in weights:
        return _download(weights)
    file = Path(weights)
    if file.is_dir():
        raise UserError(f"weights '{weights}' are a folder: name a .pth or .pkl file")
    if not file.is_file():
        siblings = file.parent.iterdir() if file.parent.is_dir() else ()
        checkpoints = [p for p in siblings if p.suffix in (".pth", ".pkl")]
        raise UserError(f"weights '{weights}' do not exist{did_you_mean_file(file, checkpoints)}")
    return file


def read_weights_file(path: Path, *, name: str, trusted: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of this project or detectron2, or weights of Caffe2, pycls or torchvision.

    ``.pkl`` is the model zoo's format, a pickle of NumPy arrays. Any other file is read as a file
    of ``torch.save``.

    Args:
        path: a local file.
        name: what messages call the file.
        trusted: read the file as a full pickle, which may run any code.

    Returns:
        "model", from names to finite tensors or arrays, and the file's other entries;
        "matching_heuristics" and "__author__" as detectron2's checkpointer expects them.

    Raises:
        UserError: the file is damaged or not a checkpoint, names code, or has weights that are not
            finite.
    """
    try:
        checkpoint = _in_detectron2s_format(path, _read(path, name, trusted))
        state = checkpoint["model"]
        _check_types(state)
        _check_class_names(checkpoint)
        broken = list(non_finite(state))
    # Arbitrary bytes can raise any error; each means the same to the user.
    except Exception as error:
        raise cannot_load(name, error, path) from error
    if broken:
        raise UserError(
            f"weights '{name}' have NaN or infinite values in {len(broken)} of {len(state)} "
            f"tensors: {listed(broken, 6)}; use a checkpoint from before the loss became NaN"
        )
    return checkpoint


def read_metadata(weights: str, *, trusted: bool = False) -> dict[str, Any]:
    """Reads a checkpoint for its entries besides the weights, such as "config".

    Args:
        weights: as for :func:`local_weights`.
        trusted: read the file as a full pickle, which may run any code.

    Returns:
        the whole checkpoint, whose tensors are only read from the disk when used; an empty dict for
        a ``.pkl``, which only has weights.

    Raises:
        UserError: the file does not exist, is damaged or names code.
    """
    file = local_weights(weights)
    if file.suffix == ".pkl":
        return {}
    try:
        content = _read(file, weights, trusted, mapped=True)
        content = content if isinstance(content, dict) else {}
        _check_class_names(content)
    except Exception as error:
        raise cannot_load(weights, error, file) from error
    return content


def read_class_names(path: str, *, trusted: bool = False) -> list[str]:
    """The class names stored in a checkpoint of this project, in the order of class ids.

    The list is empty for other checkpoints (model zoo, ``.pkl``).

    Args:
        path: a file, a URL or a ``detectron2://`` name.
        trusted: read the file as a full pickle, which may run any code.

    Raises:
        UserError: the file does not exist, is damaged or names code.
    """
    return list(read_metadata(path, trusted=trusted).get("class_names") or [])


def read_torch(path: Path, *, mapped: bool = False, also: Sequence[type] = ()) -> Any:
    """Reads a file of ``torch.save`` with ``weights_only=True``, tensors on the CPU.

    torch does not compare the checksums in a zip archive with the content; this does.

    Args:
        path: the file.
        mapped: read the tensors from the disk only when they are used, and no checksums.
        also: further classes that the file may contain; they must be safe with any attributes.

    Raises:
        UnsafePickleError: the file names another class or function.
        Exception: any type, if the file is damaged.
    """
    allowed: list[Any] = [*((value, name) for name, value in _ALLOWED.items()), *also]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch also raises an error
        try:
            # torch maps only zip archives, and not the files of torch before 1.6.
            is_zip = zipfile.is_zipfile(path)
            if is_zip and not mapped:
                _check_checksums(path)
            mapped = mapped and is_zip
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            if match := re.search(r"GLOBAL (\S+)", str(error)):
                raise UnsafePickleError(match[1]) from error
            raise


def cannot_load(name: str, error: Exception, path: Path | None = None) -> UserError:
    """The error to raise for weights; with a path, it says what the file is instead."""
    text = explain(error)
    if isinstance(error, UnsafePickleError):
        text += (
            f"; if you trust the author of the file, add {TRUST_FLAG} (in Python "
            "trust_checkpoint=True)"
        )
    elif path and not isinstance(error, BadFileError):
        text = _kind_of_other_file(path) or text
    return UserError(f"weights '{name}' cannot be loaded: {text}")


def explain(error: Exception) -> str:
    """The reason why a file cannot be read, on one line."""
    # torch adds advice on how to switch its safety off.
    text = reason(error, 1000).rpartition("WeightsUnpickler error: ")[2]
    text = re.split(r"This file can still be|Re-running|In PyTorch 2\.6|Check the doc", text)[0]
    kind = "" if isinstance(error, BadFileError) else f"{type(error).__name__}: "
    return f"{kind}{text.strip()[:160]}"


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and the number of the others, for an error message."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def non_finite(tensors: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tensors or arrays with a NaN or an infinity."""
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        # The sum takes one pass, but it may overflow.
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            yield name


def _read(path: Path, name: str, trusted: bool, *, mapped: bool = False) -> Any:
    if trusted:
        logger.warning(f"{TRUST_FLAG}: reading {name} as a full pickle, which may run any code")
    if path.suffix != ".pkl":
        if trusted:
            return torch.load(path, map_location="cpu", weights_only=False)
        return read_torch(path, mapped=mapped)
    # NumPy arrays that Python 2 pickled need latin1.
    unpickler = pickle.Unpickler if trusted else _ZooUnpickler
    with path.open("rb") as file:
        return unpickler(file, encoding="latin1").load()


def _in_detectron2s_format(path: Path, content: Any) -> dict[str, Any]:
    """Does what detectron2's checkpointer does with the formats that it knows."""
    if not isinstance(content, dict):
        raise BadFileError(f"expected a dict, got {type(content).__name__}")
    if path.suffix == ".pyth":
        if "model_state" not in content:
            raise BadFileError("'model_state' is missing, which a .pyth file has")
        return _to_match(content["model_state"], "pycls", unused="num_batches_tracked")
    if path.suffix == ".pkl":
        if "model" in content and "__author__" in content:
            return content
        # Caffe2's detection models have "blobs", its ImageNet models do not.
        return _to_match(content.get("blobs", content), "Caffe2", unused="_momentum")
    if is_efficientnet(content):
        return _to_match(to_timm(content), "efficientnet_lite_pytorch", unused="_tracked")
    return content if "model" in content else {"model": content}


def _to_match(state: Any, author: str, *, unused: str) -> dict[str, Any]:
    """Weights with other names, which detectron2 matches with the model's."""
    state = {key: value for key, value in state.items() if not str(key).endswith(unused)}
    return {"model": state, "__author__": author, "matching_heuristics": True}


def _check_types(state: Any) -> None:
    if not isinstance(state, dict) or not state:
        raise BadFileError("no tensors in the file")
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable():
            raise BadFileError(f"{name!a:.100} is not the name of a tensor")
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise BadFileError(f"'{name}' is a {type(value).__name__}, not a tensor")


def _check_class_names(checkpoint: dict[str, Any]) -> None:
    names = checkpoint.get("class_names") or []
    if type(names) not in (list, tuple) or len(names) > _MAX_CLASSES:
        raise BadFileError(f"'class_names' is not a list of at most {_MAX_CLASSES} names")
    for name in names:
        if type(name) is not str or len(name) > _MAX_CLASS_NAME:
            shown = f"a {type(name).__name__}" if type(name) is not str else f"'{name[:40]}...'"
            raise BadFileError(
                f"'class_names' contains {shown}, expected strings of at most "
                f"{_MAX_CLASS_NAME} characters"
            )


def _check_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if name := archive.testzip():
            raise BadFileError(f"it is damaged: the checksum of its part '{name}' is wrong")


def _kind_of_other_file(path: Path) -> str:
    """Names a common mistake: an empty file, or a web page about an error."""
    with path.open("rb") as file:
        head = file.read(200)
    if not head:
        return "the file is empty"
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return ""
    if not all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        return ""
    return f"the file is text that begins with '{' '.join(text.split())[:40]}'"


class _DType:
    """Replaces ``numpy.dtype``, which accepts a state with flags that break memory safety."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or np.dtype(code).kind not in "biuf":
            raise BadFileError("only arrays of numbers are supported")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replaces ``numpy.ndarray`` and its constructor; holds only numbers."""

    def __new__(cls, *_: Any) -> "_Array":
        return super().__new__(cls, 0)

    def __setstate__(self, state: Any) -> None:
        if self.size:  # would free memory that a tensor may share
            raise BadFileError("the file restores an array twice")
        shape, dtype, fortran, data = state[-4:]
        super().__setstate__((1, shape, dtype.dtype, fortran, data))


def _scalar(dtype: _DType, data: Any) -> np.generic:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype)[0]


def _from_buffer(data: Any, dtype: _DType, shape: Any, order: Any) -> np.ndarray:
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="))


# Names that a file may use besides those that torch allows, and what replaces them.
_ALLOWED: dict[str, Any] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    "collections.OrderedDict": OrderedDict,
    # How pickle protocols 0 to 2 write bytes.
    "_codecs.encode": codecs.encode,
    "builtins.bytes": bytes,
    "__builtin__.bytes": bytes,
}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    _ALLOWED[f"{_core}.multiarray._reconstruct"] = _Array
    _ALLOWED[f"{_core}.multiarray.scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric._frombuffer"] = _from_buffer


class _ZooUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in _ALLOWED:
            raise UnsafePickleError(full)
        return _ALLOWED[full]


def _download(url: str) -> Path:
    try:
        file = Path(PathManager.get_local_path(url))
    except UserError:
        raise
    except Exception as error:  # an unknown name of detectron2's catalog, a handler of the user
        raise UserError(f"cannot find the weights '{url}': {reason(error)}") from error
    if not file.is_file():
        raise UserError(f"weights '{url}' do not exist")
    return file
