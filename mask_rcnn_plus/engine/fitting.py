"""Fits a checkpoint to a model: rows of classes by their names, and the config that fits."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from torch import Tensor

from mask_rcnn_plus import compat
from mask_rcnn_plus.engine.weights import listed

# Parameters with one row per class, or four in bbox_pred; some have one more for the background.
_PER_CLASS = re.compile(
    r"roi_heads\.(box_predictor\.(\d\.)?(cls_score|bbox_pred)|mask_head\.predictor)\.(weight|bias)"
)


def stored_classes(checkpoint: Mapping[str, Any]) -> list[str]:
    """The class names of a checkpoint, in the order of its rows; [] if unknown.

    Files of the model zoo do not contain names: 80 classes are COCO's, and one class of a keypoint
    model is "person".
    """
    if names := checkpoint.get("class_names"):
        return list(names)
    state = checkpoint["model"]
    count = _number_of_classes(state)
    if count == 80:
        return list(MetadataCatalog.get("coco_2017_train").thing_classes)
    is_person = count == 1 and any("keypoint_head" in key for key in state)
    return ["person"] if is_person else []


def match_classes(
    state: dict[str, Any],
    own: Mapping[str, Tensor],
    *,
    stored_names: Sequence[str],
    names: Sequence[str],
) -> str:
    """Gives each class of the model the rows of the class with its name, in place.

    Classes that the checkpoint does not have keep the model's initial values. With as many classes
    and no name in common (renamed classes), nothing changes. Names are compared without case.

    Args:
        state: the checkpoint's tensors or arrays by parameter; replaced where they have rows per
            class.
        own: the model's parameters by name.
        stored_names, names: the classes of the checkpoint and of the model, in the order of ids.

    Returns:
        a sentence about the classes for the log; "" if nothing changed.
    """
    rows = {name.casefold(): row for row, name in enumerate(stored_names)}
    pairs = [(new, rows.get(name.casefold())) for new, name in enumerate(names)]
    found = [(new, old) for new, old in pairs if old is not None]
    if not found or [old for _, old in pairs] == list(range(len(stored_names))):
        return ""
    changed = False
    for key in filter(_PER_CLASS.fullmatch, state.keys() & own.keys()):
        stored = torch.as_tensor(state[key])
        per_class = 4 if "bbox_pred" in key else 1
        background = stored.shape[0] - per_class * len(stored_names)
        expected = (per_class * len(names) + background, *stored.shape[1:])
        if background not in (0, 1) or own[key].shape != expected:
            continue  # class-agnostic, or another head
        tensor = own[key].detach().cpu().clone()
        for new, old in found:
            tensor[new * per_class : (new + 1) * per_class] = stored[
                old * per_class : (old + 1) * per_class
            ]
        if background:
            tensor[-1] = stored[-1]
        state[key] = tensor
        changed = True
    if not changed:
        return ""
    new_names = [names[new] for new, old in pairs if old is None]
    rest = f"; new classes start random: {listed(new_names, 5)}" if new_names else ""
    return (
        f"classes taken from the file by name: {listed([names[new] for new, _ in found], 5)}{rest}"
    )


def fitting_config(
    checkpoint: Mapping[str, Any], own: Mapping[str, Tensor], *, weights: str, trains: bool
) -> str:
    """What makes weights of another architecture fit, for the end of a message; "" if unknown.

    Args:
        checkpoint: with "model", and "config" if it is of a run of this project.
        own: the model's parameters by name.
        weights: the checkpoint's file, URL or ``detectron2://`` name.
        trains: prefer the configs for fine-tuning, if the current folder is a clone.
    """
    state = checkpoint["model"]
    if any(key.startswith("backbone.body.layer1.") for key in state):
        return "; they are torchvision's: run `mask-rcnn-plus convert-torchvision` on them"
    run = Path(weights).with_name("config.yaml")
    if checkpoint.get("config") and "://" not in weights and run.is_file():
        return f"; they fit --config-file {shlex.quote(str(run))}"
    name = zoo_model(state)
    if not name or name == zoo_model(own):
        return ""
    config = Path(f"configs/finetune/{name}.yaml")
    if not trains or not config.is_file():
        config = Path(f"configs/coco/{name}_3x.yaml")
    classes = _number_of_classes(state)
    count = "" if trains or classes == 80 else f" MODEL.ROI_HEADS.NUM_CLASSES {classes}"
    return f"; they fit --config-file {config.as_posix()}{count}"


def zoo_model(state: Mapping[str, Any]) -> str:
    """The model of detectron2's zoo with these parameters, without its schedule; "" if none.

    Recognises ResNets and ResNeXts of detectron2 by the names and shapes of their parameters, with
    any number of classes.
    """
    blocks = {key.split(".res4.")[1].split(".")[0] for key in state if ".res4." in key}
    body = "backbone.bottom_up." if "backbone.fpn_lateral2.weight" in state else "backbone."
    first = state.get(f"{body}res2.0.conv1.weight")
    # Variants with group norm or deformable convolutions have configs of their own.
    other = any(key.endswith(("lateral2.norm.weight", "conv2_offset.weight")) for key in state)
    if first is None or other or len(blocks) not in (6, 23):
        return ""
    depth = "R_50" if len(blocks) == 6 else "X_101_32x8d" if first.shape[0] == 256 else "R_101"
    neck = "C4" if "roi_heads.res5.0.conv1.weight" in state else "DC5"
    neck = "FPN" if body.endswith("up.") else neck
    heads = {key.split(".")[1] for key in state if key.startswith("roi_heads.")}
    masks, keypoints = "mask_head" in heads, "keypoint_head" in heads
    task = (
        ("keypoint_mask" if masks else "keypoint") if keypoints else "mask" if masks else "faster"
    )
    if "roi_heads.box_predictor.2.cls_score.weight" in state:
        task = f"cascade_{task}"
    name = f"{task}_rcnn_{depth}_{neck}"
    # Not all combinations exist.
    return (
        name
        if Path(compat.__file__).with_name("model_zoo").joinpath(f"{name}_3x.yaml").is_file()
        else ""
    )


def _number_of_classes(state: Mapping[str, Any]) -> int:
    """As the first box head says; 0 without one."""
    scores = [v for k, v in state.items() if re.search(r"box_predictor\.(0\.)?cls_score\.bias$", k)]
    return len(scores[0]) - 1 if scores else 0
