"""The model benchmark's case: images, objects in them, and weights that find something."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import BoxMode
from torch import Tensor, nn

from benchmarks.model_sides import set_limits

# How many candidates for every detection a score threshold lets pass, about as with a trained
# model; the rest falls to non-maximum suppression.
_CANDIDATES = 5
# Deviation, over places, of what a random layer gives: classes and masks that are decided, boxes
# that move by a few per cent of their size.
_SPREAD = {
    "objectness_logits": 2.0,
    "anchor_deltas": 0.1,
    "cls_score": 3.0,
    "bbox_pred": 0.3,
    "predictor": 3.0,
}


def make_image(height: int, width: int, seed: int) -> Tensor:
    """A picture of soft blobs and some noise: uint8 (3, height, width), BGR."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (max(2, height // 50), max(2, width // 50), 3))
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture += random.normal(0, 8, picture.shape)
    return torch.from_numpy(picture.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def make_records(
    folder: Path, count: int, *, height: int, width: int, classes: int, objects: int = 8
) -> list[dict[str, Any]]:
    """JPEG files and their objects, ellipses as polygons, in detectron2's format."""
    records = []
    for number in range(count):
        random = np.random.default_rng(number)
        path = folder / f"{number}.jpg"
        picture = make_image(height, width, number).permute(1, 2, 0).numpy()
        cv2.imwrite(str(path), picture)
        annotations = []
        for _ in range(objects):
            sides = random.uniform(0.06, 0.5, 2) * (width, height)
            middle = random.uniform(0.15, 0.85, 2) * (width, height)
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            ring = middle + sides / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
            ring = ring.clip(0, (width, height))
            annotations.append(
                {
                    "bbox": [*ring.min(0).tolist(), *ring.max(0).tolist()],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": int(random.integers(classes)),
                    "segmentation": [ring.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
        records.append(
            {
                "file_name": str(path),
                "image_id": number,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return records


@torch.no_grad()
def settle(model: nn.Module, inputs: list[dict[str, Any]], detections: int) -> float:
    """Gives a model random weights with which the wanted number of objects is found.

    Residual branches are damped, so that maps do not grow from block to block; the last layers'
    outputs get the mean 0 and a deviation; masks are blobs, since convolutions of the mask head
    average over their window; the least score is ``find_threshold``'s.

    Args:
        model: detectron2's, in evaluation mode, with the weights of its construction.
        inputs: images to look at.
        detections: wanted of each image.

    Returns:
        the least score, in ``SCORE_THRESH_TEST``'s sense, already set in this model.
    """
    for name, buffer in model.named_buffers():
        if name.endswith(("conv3.norm.weight", "conv2.norm.weight")):
            buffer.fill_(0.3)
    mask_head = getattr(model.roi_heads, "mask_head", None)
    for layer in mask_head.modules() if mask_head is not None else ():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            mean = layer.weight.mean((2, 3), keepdim=True)
            # Deviations shrink in a mean; this makes up for it.
            side = (layer.weight[0, 0].numel()) ** 0.5
            layer.weight.copy_((mean * side).expand_as(layer.weight))
    handles = [
        layer.register_forward_hook(_spread(_SPREAD[kind]))
        for name, layer in model.named_modules()
        if (kind := name.rsplit(".", 1)[-1]) in _SPREAD and hasattr(layer, "weight")
    ]
    model.inference(inputs, do_postprocess=False)
    for handle in handles:
        handle.remove()
    return find_threshold(model, inputs, detections)


@torch.no_grad()
def find_threshold(model: nn.Module, inputs: list[dict[str, Any]], detections: int) -> float:
    """The least score with which so many objects are found, and a usual number of candidates.

    Args:
        model: detectron2's, in evaluation mode; it is set in this model.
        inputs: images to look at.
        detections: wanted of each image.
    """
    set_limits(model, threshold=1.0, detections=detections)
    predictor = [m for m in model.modules() if hasattr(m, "test_score_thresh")][-1]
    found: list[Tensor] = []
    handle = predictor.register_forward_hook(lambda m, a, out: found.append(out[0].float()))
    model.inference(inputs, do_postprocess=False)
    handle.remove()
    scores = found[-1].softmax(1)[:, :-1].flatten().sort(descending=True)[0]
    wanted = _CANDIDATES * detections * len(inputs)
    while True:
        threshold = float(scores[min(wanted, len(scores)) - 1])
        set_limits(model, threshold=threshold, detections=detections)
        counts = [len(one) for one in model.inference(inputs, do_postprocess=False)]
        if min(counts) >= detections or wanted >= len(scores):
            return threshold
        wanted *= 2


def _spread(target: float) -> Any:
    """A hook that scales and shifts a layer, once, to the mean 0 and a deviation a channel."""
    done: list[int] = []

    def hook(layer: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if done or not output.numel():
            return None
        done.append(1)
        rest = [d for d in range(output.dim()) if d != 1]
        scale = target / output.std(rest).clamp(min=1e-6)
        mean = output.mean(rest)
        # nn.ConvTranspose2d alone has its output channels second; none of the last layers is one.
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.copy_((layer.bias - mean) * scale)
        shape = [1, -1, *[1] * (output.dim() - 2)]
        return (output - mean.view(shape)) * scale.view(shape)

    return hook
