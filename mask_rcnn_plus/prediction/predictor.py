"""Predicts on lists of images in batches."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from PIL import Image

from mask_rcnn_plus.data.pixels import BGR, check_array_format, in_format, to_bgr
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import encoded_masks
from mask_rcnn_plus.evaluation.inference import can_split
from mask_rcnn_plus.modeling import PastedMasks, RunLengthMasks, postprocess
from mask_rcnn_plus.optimization import optimize
from mask_rcnn_plus.prediction.building import build_model, read_config, resolve_classes

# The predictor reads this many batches at once, to find images of one size among them, ...
_BATCHES_AT_A_TIME = 4
# ... but no more images when they have this many pixels.
_PIXELS_AT_A_TIME = 2**26
# The ratio of the sides from which test-time augmentation may shrink one side to nothing.
_THIN = 500


class BatchPredictor:
    """A trained model that predicts on lists of images; detectron2's DefaultPredictor accepts one.

    ``BatchPredictor(cfg)`` reads a config as DefaultPredictor does; ``from_checkpoint`` needs only
    a run's checkpoint. The results equal DefaultPredictor's: images share a batch only if they have
    the same size after resizing and padding, so each gets the padding that it would get in a batch
    of one. In a batch, floating point sums may have another order, which changes boxes and scores
    in about the seventh digit.

    Several threads may call one predictor. They read and resize images in parallel; the network
    runs for one caller at a time.

    With TEST.AUG.ENABLED, detectron2's GeneralizedRCNNWithTTA predicts on each image, in all sizes
    of TEST.AUG.MIN_SIZES and, with TEST.AUG.FLIP, also flipped.

    Attributes:
        model: in evaluation mode.
        class_names: in the order of class ids; empty if unknown.
        batch_size: largest number of images in a batch.
        sixteen_bit: INPUT.SIXTEEN_BIT of the model.
    """

    @configurable
    def __init__(
        self,
        *,
        model: torch.nn.Module,
        resize: transforms.Augmentation,
        input_format: str = "BGR",
        augmented: GeneralizedRCNNWithTTA | None = None,
        class_names: Sequence[str] = (),
        batch_size: int = 4,
        sixteen_bit: str = "image",
        array_format: str = "BGR",
        paste: bool = True,
    ) -> None:
        """
        Args:
            model: accepts detectron2's batches; is set to evaluation mode.
            resize: resizes an image for the network.
            input_format: what the model expects, "BGR", "RGB" or "L" (grey).
            augmented: the model with test-time augmentation, or None.
            class_names, batch_size, sixteen_bit: the attributes.
            array_format: channel order of input arrays, "BGR" (as ``cv2.imread`` returns) or "RGB".
                Files and PIL images do not need it.
            paste: return ``pred_masks`` as DefaultPredictor does, bool (R, H, W). Otherwise they
                are PastedMasks (RunLengthMasks with test-time augmentation), whose memory does not
                grow with the image; both have ``rle()`` and ``to_tensor()``.

        Raises:
            UserError: a format is unknown, or the batch size is less than 1.
        """
        if input_format not in ("BGR", "RGB", "L"):
            raise UserError(f"INPUT.FORMAT is '{input_format}': must be BGR, RGB or L")
        _check(array_format, batch_size)
        if isinstance(class_names, str) or not isinstance(class_names, Sequence):
            raise UserError(
                f"class_names is {class_names!r}: give a list of names, in order of ids"
            )
        self.model = model.eval()
        self.class_names = list(class_names)
        self.batch_size = batch_size
        self.sixteen_bit = sixteen_bit
        self._resize = resize
        self._input_format = input_format
        self._augmented = augmented
        self._array_format = array_format
        self._paste = paste
        self._lock = threading.Lock()

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        *,
        trust_checkpoint: bool = False,
        optimize_to: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the constructor for ``BatchPredictor(cfg, ...)``.

        Args:
            cfg: as for DefaultPredictor; MODEL.WEIGHTS must contain every parameter.
            trust_checkpoint: read it as a full pickle, which may run any code.
            optimize_to: predict with a copy from ``mask_rcnn_plus.optimize`` in this dtype.
            kwargs: for the constructor, such as ``batch_size``.
        """
        _check(kwargs.get("array_format", "BGR"), kwargs.get("batch_size", 1))
        cfg, names = resolve_classes(cfg, trusted=trust_checkpoint)
        if cfg.TEST.AUG.ENABLED and cfg.MODEL.KEYPOINT_ON:
            raise UserError(
                "TEST.AUG.ENABLED is True, but keypoints do not support it: set it False"
            )
        model = build_model(cfg, trusted=trust_checkpoint)
        if optimize_to is not None:
            model = optimize(model, optimize_to)
        side = cfg.INPUT.MIN_SIZE_TEST
        return {
            "model": model,
            "resize": transforms.ResizeShortestEdge([side, side], cfg.INPUT.MAX_SIZE_TEST),
            "input_format": cfg.INPUT.FORMAT,
            "sixteen_bit": cfg.INPUT.get("SIXTEEN_BIT", "image"),
            "augmented": GeneralizedRCNNWithTTA(cfg, model) if cfg.TEST.AUG.ENABLED else None,
            "class_names": names,
            **kwargs,
        }

    @classmethod
    def from_checkpoint(
        cls,
        weights: str | Path,
        config_file: str | Path | None = None,
        opts: Sequence[str] = (),
        *,
        trust_checkpoint: bool = False,
        **kwargs: Any,
    ) -> "BatchPredictor":
        """Builds a predictor from a checkpoint, on the GPU if there is one.

        Args:
            weights: a file, a URL or a ``detectron2://`` name.
            config_file: for weights without a config: a ``.pkl``, or a ``.pth`` of another program.
            opts: config keys and values in turn, e.g. ``["MODEL.DEVICE", "cpu"]``.
            trust_checkpoint: read the weights as a full pickle, which may run any code.
            kwargs: for ``from_config`` and the constructor, such as ``batch_size``.

        Raises:
            UserError: weights or config are missing or invalid.
        """
        cfg = read_config(str(weights), config_file, opts, trusted=trust_checkpoint)
        return cls(cfg, trust_checkpoint=trust_checkpoint, **kwargs)

    def __call__(
        self,
        images: Iterable[Any],
        *,
        on_error: Callable[[int, UserError], None] | None = None,
    ) -> list[Instances]:
        """Detects the objects in each image.

        Args:
            images: paths, PIL images and arrays as ``to_bgr`` accepts them, in any mix.
            on_error: called with the position and the error of each item that cannot be read. Its
                result is an image of size (0, 0) without objects. None raises the first error.

        Returns:
            one Instances per image, in its pixels, on the model's device: ``pred_boxes``,
            ``scores``, ``pred_classes``, and ``pred_masks`` or ``pred_keypoints`` if the model has
            such a head. Images from files are upright, by their EXIF orientation.

        Raises:
            UserError: an item is not an image, and ``on_error`` is None.

        @public
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            raise UserError(f"give a list of images, not a single {type(images).__name__}")
        if isinstance(images, np.ndarray) and images.ndim < 4:
            raise UserError(
                f"give a list of images, such as [image], not one array of shape {images.shape}"
            )
        results: dict[int, Instances] = {}
        part: dict[int, BGR] = {}
        read = read_all(images, self._array_format, self.sixteen_bit, on_error)
        for i, pixels in enumerate(read):
            if pixels is None:
                results[i] = no_objects()
                continue
            part[i] = pixels
            # Only some of a long list of files are in memory at a time.
            area = sum(array.shape[0] * array.shape[1] for array in part.values())
            if len(part) == _BATCHES_AT_A_TIME * self.batch_size or area > _PIXELS_AT_A_TIME:
                results.update(zip(part, self._predict(list(part.values())), strict=True))
                part = {}
        results.update(zip(part, self._predict(list(part.values())), strict=True))
        return [results[i] for i in sorted(results)]

    def _predict(self, images: Sequence[BGR]) -> list[Instances]:
        inputs = [self._to_input(image) for image in images]
        results: dict[int, Instances] = {}
        for indices in self._batches(inputs):
            outputs = self._run([inputs[i] for i in indices])
            for i, instances in zip(indices, outputs, strict=True):
                results[i] = self._convert_masks(instances)
        return [results[i] for i in range(len(inputs))]

    def _to_input(self, image: BGR) -> dict[str, Any]:
        """An image as detectron2's models expect it; the same as in DefaultPredictor."""
        height, width = image.shape[:2]
        image = in_format(image, self._input_format)
        # The augmentation resizes by itself, and expects uint8.
        if self._augmented is None or max(height, width) > _THIN * min(height, width):
            resize = self._resize.get_transform(image)
            if isinstance(resize, transforms.ResizeTransform):  # a 1 x 4000 image would vanish
                resize.new_h, resize.new_w = max(1, resize.new_h), max(1, resize.new_w)
            image = resize.apply_image(image)
        tensor = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        if self._augmented is None:
            tensor = tensor.float()
        return {"image": tensor, "height": height, "width": width}

    def _batches(self, inputs: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The indices of the inputs of each batch, which have one size after padding."""
        step = getattr(getattr(self.model, "backbone", None), "size_divisibility", 0) or 1
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, entry in enumerate(inputs):
            padded = tuple(-(-side // step) for side in entry["image"].shape[1:])
            by_size.setdefault(padded, []).append(i)
        return [
            indices[start : start + self.batch_size]
            for indices in by_size.values()
            for start in range(0, len(indices), self.batch_size)
        ]

    def _run(self, batch: list[dict[str, Any]]) -> list[Instances]:
        # One caller at a time: the augmentation switches heads of the shared model off and on, and
        # two batches would need twice the memory.
        with self._lock, torch.no_grad():
            if self._augmented is not None:
                heads: Any = self.model.roi_heads
                mask_on = getattr(heads, "mask_on", False)
                try:
                    return [output["instances"] for output in self._augmented(batch)]
                finally:  # after an error, detectron2 leaves the mask head switched off
                    heads.mask_on = mask_on
            if not can_split(self.model):
                return [output["instances"] for output in self.model(batch)]
            raw = self.model.inference(batch, do_postprocess=False)
        return [
            postprocess(instances, entry["height"], entry["width"])
            for instances, entry in zip(raw, batch, strict=True)
        ]

    def _convert_masks(self, instances: Instances) -> Instances:
        """Converts masks, if there are any, to the form that ``paste`` chooses."""
        masks = instances.get_fields().get("pred_masks")
        if isinstance(masks, PastedMasks):
            if self._paste:
                instances.pred_masks = masks.to_tensor()
        elif masks is not None and not self._paste:
            instances.pred_masks = RunLengthMasks(encoded_masks(masks.cpu()), instances.image_size)
        return instances


def read_all(
    images: Iterable[Any],
    array_format: str,
    sixteen_bit: str,
    on_error: Callable[[int, UserError], None] | None,
) -> Iterator[BGR | None]:
    """The pixels of each item; None after a call of ``on_error``, as in BatchPredictor."""
    for i, image in enumerate(images):
        pixels = None
        try:
            named = f"image {i} of the list"
            pixels = to_bgr(image, array_format=array_format, sixteen_bit=sixteen_bit, named=named)
        except UserError as error:
            if on_error is None:
                raise
            on_error(i, error)
        yield pixels


def no_objects() -> Instances:
    """The result for an item that cannot be read: an image of size (0, 0)."""
    return Instances(
        (0, 0),
        pred_boxes=Boxes(torch.zeros(0, 4)),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.int64),
    )


def _check(array_format: str, batch_size: int) -> None:
    """Raises a UserError for a wrong argument, before the weights are read."""
    check_array_format(array_format)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
