"""Inputs of the model benchmark: images, training batches, and weights that find objects."""

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from torch import Tensor, nn

from benchmarks.harness import alternate
from benchmarks.model_implementations import Inputs, set_limits
from mask_rcnn_plus.data import NamingMapper, PolygonMapper, require_dataset
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.errors import UserError

# Photographs are larger than the images that a network is trained on.
_PHOTO_SCALE = 1.25
_OBJECTS_PER_IMAGE = 8
_LOADED_IMAGES, _LOADING_REPEATS = 4, 3
# Candidates above the score threshold per detection, about as with a trained model; non-maximum
# suppression removes the others.
_CANDIDATES = 5
# Standard deviation of a random last layer's outputs. With these values, classes and masks are
# clear, and boxes move by a few per cent of their size.
_OUTPUT_STD = {
    "objectness_logits": 2.0,
    "anchor_deltas": 0.1,
    "cls_score": 3.0,
    "bbox_pred": 0.3,
    "predictor": 3.0,
}


def inference_images(cfg: CfgNode, name: str | None, count: int, size: tuple[int, int]) -> Inputs:
    """Images as a test loader returns them.

    Args:
        cfg: its INPUT says how the images of a data set are resized.
        name: the data set's; None for generated images of ``size``.
        count: the number of images; a smaller data set is repeated.
        size: (height, width).
    """
    if name is None:
        shape = {"height": size[0], "width": size[1]}
        return [{"image": make_image(*size, seed), **shape} for seed in range(count)]
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON = False
    mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
    records = require_dataset(name)
    return [mapper(copy.deepcopy(records[i % len(records)])) for i in range(count)]


def training_batches(
    cfg: CfgNode, name: str | None, *, batch: int, batches: int, size: tuple[int, int]
) -> tuple[list[Inputs], tuple[float, float]]:
    """Mapped samples with ground truth, and the time that loading takes.

    Args:
        cfg: detectron2's; for generated images its INPUT is set, in place, to the size.
        name: the data set's; None for generated JPEG images.
        batch: samples per batch.
        batches: the number of batches.
        size: (height, width) of the network's input.

    Returns:
        the batches, and the milliseconds that detectron2's mapper and ours take for a batch, in one
        process.

    Raises:
        UserError: the data set has too few images with objects.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name is None:
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = [min(size)], max(size)
            height, width = (round(_PHOTO_SCALE * length) for length in size)
            classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
            records = [
                _make_record(Path(folder), number, height=height, width=width, classes=classes)
                for number in range(batch * batches)
            ]
        else:
            records = [r for r in require_dataset(name, training=True) if r.get("annotations")]
            # The mapper looks up here which keypoints a mirrored image swaps.
            cfg = cfg.clone()
            cfg.DATASETS.TRAIN = [name]
        polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
        mapper = DatasetMapper(cfg, is_train=True)
        converting = PolygonMapper(mapper) if polygons else mapper
        # A data set may contain run lengths, which detectron2's mapper does not convert.
        stock = mapper if name is None else converting
        ours = NamingMapper(converting)
        samples = []
        for number in range(batches):
            chosen = [records[(number * batch + i) % len(records)] for i in range(batch)]
            seed_all(0, "benchmark", number)
            samples.append([ours(copy.deepcopy(record)) for record in chosen])
        if not all(len(sample["instances"]) for sample in itertools.chain(*samples)):
            raise UserError(f"data set '{name}' has images without objects among those used")
        stock_ms, our_ms = _loading_times((stock, ours), records[:_LOADED_IMAGES])
    return samples, (batch * stock_ms, batch * our_ms)


def _loading_times(
    mappers: Sequence[Callable[[dict[str, Any]], Any]], records: Sequence[dict[str, Any]]
) -> list[float]:
    """Median milliseconds per image of each mapper, alternately, from the same seeds."""

    def load(number: int, index: int, turn: int) -> float:
        seed_all(0, "benchmark", number)
        start = time.perf_counter()
        mappers[index](copy.deepcopy(records[number]))
        return 1e3 * (time.perf_counter() - start)

    keys = list(itertools.product(range(len(records)), range(len(mappers))))
    times = alternate({key: partial(load, *key) for key in keys}, turns=_LOADING_REPEATS)
    return [
        statistics.median(t for number, i in keys if i == index for t in times[number, i])
        for index in range(len(mappers))
    ]


def make_image(height: int, width: int, seed: int) -> Tensor:
    """An image of soft blobs with some noise: uint8 (3, height, width), BGR."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (max(2, height // 50), max(2, width // 50), 3))
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image += random.normal(0, 8, image.shape)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _make_record(
    folder: Path, number: int, *, height: int, width: int, classes: int
) -> dict[str, Any]:
    """A JPEG file and its objects, ellipses as polygons, in detectron2's format."""
    random = np.random.default_rng(number)
    path = folder / f"{number}.jpg"
    cv2.imwrite(str(path), make_image(height, width, number).permute(1, 2, 0).numpy())
    annotations = []
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for _ in range(_OBJECTS_PER_IMAGE):
        axes = random.uniform(0.06, 0.5, 2) * (width, height)
        center = random.uniform(0.15, 0.85, 2) * (width, height)
        ring = center + axes / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
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
    record = {"file_name": str(path), "image_id": number, "annotations": annotations}
    return {**record, "height": height, "width": width}


@torch.no_grad()
def set_random_weights(model: nn.Module, inputs: Inputs, detections: int) -> float:
    """Changes a model's random weights so that it finds a given number of objects.

    Residual branches are damped, so that activations do not grow from block to block. The last
    layers' outputs get mean 0 and a fixed deviation. The mask head's convolutions average over
    their window, so that masks are blobs.

    Args:
        model: detectron2's, in evaluation mode, with the weights of its construction.
        inputs: images to calibrate on.
        detections: wanted per image.

    Returns:
        the score threshold of ``find_threshold``, already set in the model.
    """
    for name, buffer in model.named_buffers():
        if name.endswith(("conv3.norm.weight", "conv2.norm.weight")):
            buffer.fill_(0.3)
    for layer in getattr(model.roi_heads, "mask_head", nn.Module()).modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            mean = layer.weight.mean((2, 3), keepdim=True)
            # Averaging shrinks deviations; this compensates.
            width = layer.weight[0, 0].numel() ** 0.5
            layer.weight.copy_((mean * width).expand_as(layer.weight))
    handles = [
        layer.register_forward_hook(_normalize_once(_OUTPUT_STD[kind]))
        for name, layer in model.named_modules()
        if (kind := name.rsplit(".", 1)[-1]) in _OUTPUT_STD and hasattr(layer, "weight")
    ]
    model.inference(inputs, do_postprocess=False)
    for handle in handles:
        handle.remove()
    return find_threshold(model, inputs, detections)


@torch.no_grad()
def find_threshold(model: nn.Module, inputs: Inputs, detections: int) -> float:
    """Sets and returns the score threshold with which a model finds enough objects.

    Args:
        model: detectron2's, in evaluation mode.
        inputs: the images.
        detections: wanted per image.
    """
    set_limits(model, threshold=1.0, detections=detections)
    predictor = [m for m in model.modules() if hasattr(m, "test_score_thresh")][-1]
    logits: list[Tensor] = []
    handle = predictor.register_forward_hook(lambda m, a, out: logits.append(out[0].float()))
    model.inference(inputs, do_postprocess=False)
    handle.remove()
    scores = logits[-1].softmax(1)[:, :-1].flatten().sort(descending=True)[0]
    candidates = _CANDIDATES * detections * len(inputs)
    while True:
        threshold = float(scores[min(candidates, len(scores)) - 1])
        set_limits(model, threshold=threshold, detections=detections)
        counts = [len(result) for result in model.inference(inputs, do_postprocess=False)]
        if min(counts) >= detections or candidates >= len(scores):
            return threshold
        candidates *= 2


def _normalize_once(std: float) -> Any:
    """A hook that, at the first call, scales and shifts a layer to mean 0 and this deviation."""
    done = False

    def hook(layer: Any, inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal done
        if done or not output.numel():
            return None
        done = True
        axes = [d for d in range(output.dim()) if d != 1]
        scale = std / output.std(axes).clamp(min=1e-6)
        mean = output.mean(axes)
        # Output channels come first, except in nn.ConvTranspose2d, which is never a last layer.
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.copy_((layer.bias - mean) * scale)
        shape = [1, -1, *[1] * (output.dim() - 2)]
        return (output - mean.view(shape)) * scale.view(shape)

    return hook
