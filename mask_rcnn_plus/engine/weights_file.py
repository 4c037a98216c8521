"""A file of weights, read as if a stranger had written it: tensors by name, or a refusal."""

import codecs
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mask_rcnn_plus.engine.plain_pickle import NotPlainError, PlainPickleError
from mask_rcnn_plus.engine.torch_archive import MOST_BYTES, read_torch
from mask_rcnn_plus.engine.zoo_pickle import read_arrays
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

TRUST_FLAG = "--trust-checkpoint"

# Mask R-CNN with X-152 and its optimiser has 1500 tensors.
_MOST_TENSORS = 20_000
_MOST_VALUES = 500_000  # beside the weights, each counted as often as it is referred to
_MOST_LEVELS = 30
_MOST_CHARACTERS = 500  # of a name
_NAMES_IN_MESSAGE = 6


def read_weights_file(path: Path, *, named: str, trusted: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of this project or detectron2, or weights of Caffe2, pycls or torchvision.

    ``.pkl`` is the model zoo's format, NumPy arrays alone; ``.pyth`` is pycls'; anything else is
    read as what ``torch.save`` writes, tensors alone.

    Args:
        path: a local file.
        named: what messages call it.
        trusted: read pickles in full, and run what they say.

    Returns:
        "model" from names to tensors or arrays, all finite, and whatever else the file holds;
        "matching_heuristics" and "__author__" as detectron2's checkpointer expects them.

    Raises:
        UserError: it is too large, no checkpoint, has anything but tensors or arrays in "model", or
            values in it that are not finite.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UserError(f"weights '{named}' have {size >> 30} GiB: at most {MOST_BYTES >> 30} do")
    try:
        checkpoint = _in_one_format(path, _read(path, named, trusted))
    except UserError:
        raise
    except NotPlainError as error:
        raise _runs_code(named, error) from error
    except Exception as error:
        # Anything can go wrong while an arbitrary file is read as a checkpoint, and each way means
        # the same to the user.
        raise no_checkpoint(named, error, path) from error
    _check_model(checkpoint["model"], named, size)
    if not trusted:
        _check_rest({k: v for k, v in checkpoint.items() if k != "model"}, named, size)
    return checkpoint


def read_beside_weights(path: Path, *, named: str, trusted: bool = False) -> dict[str, Any]:
    """What a ``.pth`` file holds, with its tensors left in the file as far as possible.

    Raises:
        UserError: as :func:`read_weights_file`, but for the weights' values.
    """
    try:
        content = _read(path, named, trusted, mapped=True)
    except NotPlainError as error:
        raise _runs_code(named, error) from error
    except Exception as error:
        raise no_checkpoint(named, error, path) from error
    return content if isinstance(content, dict) else {}


def _runs_code(named: str, error: NotPlainError) -> UserError:
    return UserError(
        f"weights '{named}' are no checkpoint that can be loaded: {error}; if you trust "
        f"whoever made the file, {TRUST_FLAG} reads it all the same"
    )


def no_checkpoint(named: str, error: Exception, path: Path | None = None) -> UserError:
    """The refusal of weights that cannot be read.

    Args:
        named: what the message calls them.
        error: why.
        path: the file, to say what it is instead.
    """
    # torch's own text goes on with how to switch its safety off.
    reason = " ".join(str(error).split("This file can still be loaded")[0].split())[:160]
    kind = "" if isinstance(error, PlainPickleError) else f"{type(error).__name__} "
    instead = "" if path is None else _plainly(path)
    return UserError(
        f"weights '{named}' are no checkpoint that can be loaded: {instead or kind + reason}"
    )


def _plainly(path: Path) -> str:
    """What a file is that people take for a checkpoint: empty, or a page about an error."""
    with path.open("rb") as file:
        head = file.read(200)
    if not head:
        return "the file is empty"
    try:
        # Whose last letter may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return ""
    if not all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        return ""
    return f"it is text, which begins with '{' '.join(text.split())[:40]}'"


def _read(path: Path, named: str, trusted: bool, *, mapped: bool = False) -> Any:
    zoo = path.suffix == ".pkl"
    if not trusted:
        return read_arrays(path) if zoo else read_torch(path, mapped=mapped)
    logger.warning(f"{TRUST_FLAG}: {named} is read as a full pickle, which may run any code")
    if not zoo:
        return torch.load(path, map_location="cpu", weights_only=False)
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def _in_one_format(path: Path, content: Any) -> dict[str, Any]:
    """What detectron2's checkpointer makes of the formats that it knows."""
    if not isinstance(content, dict):
        raise PlainPickleError("it is no dictionary")
    if path.suffix == ".pyth":
        if "model_state" not in content:
            raise PlainPickleError("a .pyth file has to have 'model_state'")
        return _to_be_matched(content["model_state"], "pycls")
    if path.suffix == ".pkl":
        if "model" in content and "__author__" in content:
            author = content["__author__"]
            logger.info(f"Reading a file from {author!r:.100}" if isinstance(author, str) else "")
            return content
        # Caffe2's detection models have "blobs", its ImageNet models have not.
        return _to_be_matched(content.get("blobs", content), "Caffe2")
    return content if "model" in content else {"model": content}


def _to_be_matched(state: Any, author: str) -> dict[str, Any]:
    """Weights under other names, which detectron2 matches with the model's."""
    if not isinstance(state, dict):
        raise PlainPickleError("its weights are no dictionary")
    unused = "_momentum" if author == "Caffe2" else "num_batches_tracked"
    state = {key: value for key, value in state.items() if not str(key).endswith(unused)}
    return {"model": state, "__author__": author, "matching_heuristics": True}


def _check_model(state: Any, named: str, file_size: int) -> None:
    if not isinstance(state, dict) or not any(map(_is_array, state.values())):
        raise UserError(f"weights '{named}' are no checkpoint: there is no tensor in them")
    if len(state) > _MOST_TENSORS:
        raise UserError(f"weights '{named}' have more than {_MOST_TENSORS} tensors")
    broken = []
    total = 0
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _MOST_CHARACTERS:
            raise UserError(f"weights '{named}' have a tensor whose name is none: {name!r:.100}")
        if not _is_array(value):
            kind = type(value).__name__
            raise UserError(f"weights '{named}' are no checkpoint: '{name}' is a {kind}, no tensor")
        total += _require_dense(name, value, named)
        # Two names of one tensor are fine; a thousand names of a large one only take time.
        if total > 4 * file_size + 2**20:
            raise UserError(f"weights '{named}' are larger than their file: '{name}' is too much")
        if not _finite(value):
            broken.append(name)
    if broken:
        rest = len(broken) - _NAMES_IN_MESSAGE
        names = ", ".join(broken[:_NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")
        raise UserError(
            f"weights '{named}' have NaN or infinite values in {len(broken)} of {len(state)} "
            f"tensors: {names}; take a checkpoint from before the loss became NaN"
        )


def _check_rest(content: Any, named: str, file_size: int) -> None:
    """Refuses what a few bytes make large: nests of shared lists, tensors that repeat themselves.

    Whoever restores, copies or prints such things would never end.
    """
    waiting = [(content, 0)]
    values = total = 0
    while waiting:
        value, level = waiting.pop()
        values += 1
        if values > _MOST_VALUES or level > _MOST_LEVELS:
            raise UserError(f"weights '{named}' hold more beside the weights than any run has")
        if _is_array(value):
            total += _require_dense("a tensor beside the weights", value, named)
            if total > 4 * file_size + 2**20:
                raise UserError(f"weights '{named}' are larger than their file")
        elif isinstance(value, dict):
            waiting += ((one, level + 1) for one in value.values())
        elif isinstance(value, list | tuple):
            waiting += ((one, level + 1) for one in value)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _require_dense(name: str, value: Any, named: str) -> int:
    """The bytes of a tensor, which have to be there one by one."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"weights '{named}': '{name}' is no dense tensor")
    size = value.numel() * value.element_size()
    if size > value.untyped_storage().nbytes():
        raise UserError(f"weights '{named}': '{name}' repeats the few numbers that it has")
    return size


def _finite(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all()) if value.dtype.kind in "fc" else True
    if not (value.is_floating_point() or value.is_complex()):
        return True
    value = value.detach()
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())
