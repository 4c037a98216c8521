"""The models of detectron2's zoo by name. Does not import detectron2, which takes seconds."""

import argparse
import ast
import os
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from mask_rcnn_tools.arguments import UsageError

DEFAULT = "mask_rcnn_R_50_FPN_3x"
# The models that have a config here: detectron2's published AP of boxes, masks and keypoints on
# COCO val2017, and MB of weights (4 bytes per parameter).
PUBLISHED: dict[str, tuple[float | None, float | None, float | None, int]] = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x": (35.7, None, None, 136),
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": (37.3, None, None, 663),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": (37.9, None, None, 167),
    "COCO-Detection/faster_rcnn_R_50_C4_3x": (38.4, None, None, 136),
    "COCO-Detection/faster_rcnn_R_50_DC5_3x": (39.0, None, None, 663),
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": (40.2, None, None, 167),
    "COCO-Detection/faster_rcnn_R_101_C4_3x": (41.1, None, None, 212),
    "COCO-Detection/faster_rcnn_R_101_DC5_3x": (40.6, None, None, 739),
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": (42.0, None, None, 243),
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": (43.0, None, None, 421),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x": (36.8, 32.2, None, 144),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x": (38.3, 34.2, None, 690),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": (38.6, 35.2, None, 178),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": (39.8, 34.4, None, 144),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_3x": (40.0, 35.9, None, 690),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": (41.0, 37.2, None, 178),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_C4_3x": (42.6, 36.7, None, 220),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x": (41.9, 37.3, None, 766),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x": (42.9, 38.6, None, 254),
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x": (44.3, 39.5, None, 431),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": (53.6, None, 64.0, 237),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x": (55.4, None, 65.5, 237),
    "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x": (56.4, None, 66.1, 313),
    "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x": (57.3, None, 66.0, 490),
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": (42.1, 36.4, None, 288),
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": (44.3, 38.5, None, 288),
}


def checkpoints() -> dict[str, str]:
    """The zoo: "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x" -> its ``detectron2://`` name.

    Raises:
        UsageError: detectron2 is not installed, or has another table.
    """
    spec = find_spec("detectron2")
    if spec is None or spec.origin is None:
        raise UsageError("detectron2 is not installed; see docs/installation.md")
    source = Path(spec.origin).with_name("model_zoo") / "model_zoo.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and "CONFIG_PATH_TO_URL_SUFFIX" in ast.unparse(
            node.targets[0]
        ):
            files = ast.literal_eval(node.value)
            return {name: f"detectron2://{name}/{file}" for name, file in files.items()}
    raise UsageError(f"{source} has no table of models")


def zoo_weights(text: str) -> str:
    """Argument ``type``: the ``detectron2://`` name of a model of the zoo.

    Args:
        text: the name, with or without its folder, ".yaml" and "_3x".
    """
    zoo = checkpoints()
    by_name = {name.rpartition("/")[2]: name for name in zoo}
    for end in ("_3x", ""):  # before models of the same name for other data sets
        by_name |= {name.rpartition("/")[2].removesuffix(end): name for name in PUBLISHED}
    name = text.removesuffix(".yaml")
    name = by_name.get(name, name)
    if name not in zoo:
        close = get_close_matches(text, [*by_name, *zoo], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise argparse.ArgumentTypeError(f"detectron2's zoo has no model '{text}'{hint}")
    return zoo[name]


def cached_file(weights: str) -> Path:
    """The file of a ``detectron2://`` name in iopath's cache; it may not exist."""
    cache = Path(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    return cache / "detectron2" / weights.removeprefix("detectron2://")
