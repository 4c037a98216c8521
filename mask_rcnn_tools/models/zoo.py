"""The models of detectron2's zoo that this project has configs for. Imports no torch."""

import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.terminal import PROGRAM, shell_command

DEFAULT = "mask_rcnn_R_50_FPN_3x"
_SERVER = "https://dl.fbaipublicfiles.com/detectron2"


class Model(NamedTuple):
    """AP on COCO val2017 as detectron2 publishes it (MODEL_ZOO.md), and the size of the weights.

    For keypoint models, the box AP is that of people.
    """

    box: float
    mask: float | None
    keypoints: float | None
    megabytes: int


MODELS = {
    "mask_rcnn_X_101_32x8d_FPN_3x": Model(44.3, 39.5, None, 431),
    "mask_rcnn_R_101_FPN_3x": Model(42.9, 38.6, None, 254),
    "mask_rcnn_R_101_DC5_3x": Model(41.9, 37.3, None, 766),
    "mask_rcnn_R_50_FPN_3x": Model(41.0, 37.2, None, 178),
    "mask_rcnn_R_101_C4_3x": Model(42.6, 36.7, None, 220),
    "mask_rcnn_R_50_DC5_3x": Model(40.0, 35.9, None, 690),
    "mask_rcnn_R_50_FPN_1x": Model(38.6, 35.2, None, 178),
    "mask_rcnn_R_50_C4_3x": Model(39.8, 34.4, None, 144),
    "mask_rcnn_R_50_DC5_1x": Model(38.3, 34.2, None, 690),
    "mask_rcnn_R_50_C4_1x": Model(36.8, 32.2, None, 144),
    "cascade_mask_rcnn_R_50_FPN_3x": Model(44.3, 38.5, None, 288),
    "cascade_mask_rcnn_R_50_FPN_1x": Model(42.1, 36.4, None, 288),
    "faster_rcnn_X_101_32x8d_FPN_3x": Model(43.0, None, None, 421),
    "faster_rcnn_R_101_FPN_3x": Model(42.0, None, None, 243),
    "faster_rcnn_R_101_C4_3x": Model(41.1, None, None, 212),
    "faster_rcnn_R_101_DC5_3x": Model(40.6, None, None, 739),
    "faster_rcnn_R_50_FPN_3x": Model(40.2, None, None, 167),
    "faster_rcnn_R_50_DC5_3x": Model(39.0, None, None, 663),
    "faster_rcnn_R_50_C4_3x": Model(38.4, None, None, 136),
    "faster_rcnn_R_50_FPN_1x": Model(37.9, None, None, 167),
    "faster_rcnn_R_50_DC5_1x": Model(37.3, None, None, 663),
    "faster_rcnn_R_50_C4_1x": Model(35.7, None, None, 136),
    "keypoint_rcnn_R_101_FPN_3x": Model(56.4, None, 66.1, 313),
    "keypoint_rcnn_X_101_32x8d_FPN_3x": Model(57.3, None, 66.0, 490),
    "keypoint_rcnn_R_50_FPN_3x": Model(55.4, None, 65.5, 237),
    "keypoint_rcnn_R_50_FPN_1x": Model(53.6, None, 64.0, 237),
}


def model_name(text: str) -> str:
    """A name in MODELS; accepts the zoo's folder in front, ".yaml" behind, and no schedule (3x).

    Raises:
        UsageError: there is no such model.
    """
    name = text.rpartition("/")[2].removesuffix(".yaml")
    for candidate in (name, f"{name}_3x"):
        if candidate in MODELS:
            return candidate
    close = get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    command = shell_command(PROGRAM, "models")
    raise UsageError(f"--model '{text}' is not in the model zoo{hint}; `{command}` lists all")


def weights(name: str) -> str:
    """The ``detectron2://`` name of a model's weights, from detectron2's own list."""
    match = re.search(
        rf'"((?:COCO-\w+|Misc)/{name})(?:\.yaml)?": "([\w./]+)"', _list_of_detectron2()
    )
    if not match:
        raise UsageError(f"--model '{name}': the installed detectron2 does not list its weights")
    return f"detectron2://{match[1]}/{match[2]}"


def config_file(name: str) -> Path:
    """The config of a model, in the plugin."""
    spec = importlib.util.find_spec("mask_rcnn_plus")
    return Path(spec.origin).parent / "compat/model_zoo" / f"{name}.yaml"


def cached_file(name: str) -> Path:
    """Where the weights of a model are kept once they are downloaded."""
    from iopath.common.file_io import get_cache_dir

    url = weights(name).replace("detectron2:/", _SERVER)
    return Path(get_cache_dir(), url.split("/", 3)[3])


def _list_of_detectron2() -> str:
    # Importing the list would import torch.
    spec = importlib.util.find_spec("detectron2")
    if not spec or not spec.origin:
        raise UsageError("detectron2 is not installed: see docs/installation.md")
    file = Path(spec.origin).parent / "model_zoo/model_zoo.py"
    return file.read_text(encoding="utf-8")
