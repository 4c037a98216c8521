"""Lists of pictures in, lists of detections out."""

import itertools
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from PIL import Image

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import encoded_masks
from mask_rcnn_plus.evaluation.inference import can_split
from mask_rcnn_plus.modeling import PastedMasks, RunLengthMasks, postprocess
from mask_rcnn_plus.optimization import optimize
from mask_rcnn_plus.prediction.building import build_model, complete, read_config
from mask_rcnn_plus.prediction.images import BGR, to_bgr

# So many batches of pictures are looked at together for those of one size.
_BATCHES_AT_A_TIME = 4


class BatchPredictor:
    """A trained model that takes lists of pictures; detectron2's DefaultPredictor takes one array.

    ``BatchPredictor(cfg)`` reads a config as DefaultPredictor does, ``from_checkpoint`` needs the
    checkpoint of a run alone. What comes out is, picture by picture, what DefaultPredictor gives:
    pictures go through the network together only where they are equally large once they are resized
    and padded, so each sees the zeros around it that it would see alone. Floating point sums may
    come in another order in a batch, which changes boxes and scores in about the seventh digit.

    One predictor may be called from several threads; pictures are read and resized side by side,
    and the network runs for one caller at a time.

    With TEST.AUG.ENABLED each picture goes through detectron2's GeneralizedRCNNWithTTA: all sizes
    of TEST.AUG.MIN_SIZES, flipped as well with TEST.AUG.FLIP.

    Attributes:
        model: in evaluation mode.
        class_names: in the order of class ids; empty where nobody knows them.
        batch_size: how many pictures go through the network together, at most.
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
        array_format: str = "BGR",
        paste: bool = True,
    ) -> None:
        """
        Args:
            model: takes detectron2's batches; is put into evaluation mode.
            resize: from a picture to the network's input.
            input_format: the order of colours that the model wants, "BGR" or "RGB".
            augmented: the model with test-time augmentation, or None.
            class_names, batch_size: the attributes.
            array_format: the order of colours in arrays that are given, "BGR" (as
                ``cv2.imread`` reads them) or "RGB". Files and PIL images need no order.
            paste: give ``pred_masks`` as DefaultPredictor does, bool (R, H, W). Otherwise they are
                PastedMasks (with test-time augmentation RunLengthMasks), whose memory does not
                grow with the picture; both have ``rle()`` and ``to_tensor()``.

        Raises:
            UserError: a format is neither BGR nor RGB, or the batch size less than 1.
        """
        for name, value in (("INPUT.FORMAT", input_format), ("array_format", array_format)):
            if value not in ("BGR", "RGB"):
                raise UserError(f"{name} is '{value}': pictures are predicted on in BGR or RGB")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: at least 1")
        self.model = model.eval()
        self.class_names = list(class_names)
        self.batch_size = batch_size
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
        """What ``BatchPredictor(cfg, ...)`` makes of a config.

        Args:
            cfg: as DefaultPredictor's; MODEL.WEIGHTS is loaded, and has to have every parameter.
            trust_checkpoint: read it as a full pickle, and run what it says.
            optimize_to: run ``mask_rcnn_plus.optimize``'s copy of the model, in "fp32", "bf16" or
                "fp16".
            kwargs: of the constructor, as ``batch_size``.
        """
        cfg, names = complete(cfg, trusted=trust_checkpoint)
        if cfg.TEST.AUG.ENABLED and cfg.MODEL.KEYPOINT_ON:
            raise UserError("TEST.AUG.ENABLED is True: keypoints have no test-time augmentation")
        model = build_model(cfg, trusted=trust_checkpoint)
        if optimize_to is not None:
            model = optimize(model, optimize_to)
        side = cfg.INPUT.MIN_SIZE_TEST
        return {
            "model": model,
            "resize": transforms.ResizeShortestEdge([side, side], cfg.INPUT.MAX_SIZE_TEST),
            "input_format": cfg.INPUT.FORMAT,
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
        """The predictor of a checkpoint, on the GPU where there is one.

        Args:
            weights: a file, a URL or a ``detectron2://`` name.
            config_file: for weights that carry no config: a ``.pkl``, other people's ``.pth``.
            opts: config keys and values in turn, e.g. ``["MODEL.DEVICE", "cpu"]``.
            trust_checkpoint: read the weights as a full pickle, and run what they say.
            kwargs: of ``from_config`` and the constructor, as ``batch_size``.

        Raises:
            UserError: something about weights or config is wrong; see the message.
        """
        cfg = read_config(str(weights), config_file, opts, trusted=trust_checkpoint)
        return cls(cfg, trust_checkpoint=trust_checkpoint, **kwargs)

    def __call__(self, images: Iterable[Any]) -> list[Instances]:
        """Detects the objects of each picture.

        Args:
            images: paths, PIL images, and arrays as ``to_bgr`` takes them, mixed as you like.

        Returns:
            one Instances a picture, in its pixels, on the model's device: ``pred_boxes``,
            ``scores``, ``pred_classes``, and ``pred_masks`` or ``pred_keypoints`` where the model
            has such a head. Those of files are upright, as EXIF says.

        Raises:
            UserError: one of them is no picture; it is named.
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            raise UserError(f"give a list of images, not a single {type(images).__name__}")
        if isinstance(images, np.ndarray) and images.ndim < 4:
            raise UserError(
                f"give a list of images, not one array of the shape {images.shape}: [image]"
            )
        results: list[Instances] = []
        numbered = enumerate(images)
        # Of a thousand paths, only some are in memory at a time.
        while part := list(itertools.islice(numbered, _BATCHES_AT_A_TIME * self.batch_size)):
            pictures = [
                to_bgr(image, array_format=self._array_format, named=f"image {number} of the list")
                for number, image in part
            ]
            results += self._predict(pictures)
        return results

    def _predict(self, pictures: Sequence[BGR]) -> list[Instances]:
        inputs = [self._to_input(picture) for picture in pictures]
        results: dict[int, Instances] = {}
        for group in self._groups(inputs):
            batch = [inputs[number] for number in group]
            for number, instances in zip(group, self._run(batch), strict=True):
                results[number] = self._finished(instances)
        return [results[number] for number in range(len(inputs))]

    def _to_input(self, picture: BGR) -> dict[str, Any]:
        """One picture of detectron2's batch, as DefaultPredictor makes it."""
        height, width = picture.shape[:2]
        if self._input_format == "RGB":
            picture = picture[:, :, ::-1]
        if self._augmented is None:
            picture = self._resize.get_transform(picture).apply_image(picture)
            tensor = torch.as_tensor(picture.astype("float32").transpose(2, 0, 1))
        else:
            # The augmentation resizes by itself, from whole numbers.
            tensor = torch.as_tensor(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    def _groups(self, inputs: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The numbers of the inputs, batch by batch."""
        step = getattr(getattr(self.model, "backbone", None), "size_divisibility", 0) or 1
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(inputs):
            padded = tuple(-(-side // step) for side in one["image"].shape[1:])
            by_size.setdefault(padded, []).append(number)
        return [
            numbers[start : start + self.batch_size]
            for numbers in by_size.values()
            for start in range(0, len(numbers), self.batch_size)
        ]

    def _run(self, batch: list[dict[str, Any]]) -> list[Instances]:
        # The augmentation switches heads of the shared model off and on; and two batches at once
        # would need the memory of both.
        with self._lock, torch.no_grad():
            if self._augmented is not None:
                return self._run_augmented(self._augmented, batch)
            if not can_split(self.model):
                return [output["instances"] for output in self.model(batch)]
            raw = self.model.inference(batch, do_postprocess=False)
        return [
            postprocess(one, entry["height"], entry["width"])
            for one, entry in zip(raw, batch, strict=True)
        ]

    def _run_augmented(
        self, augmented: GeneralizedRCNNWithTTA, batch: list[dict[str, Any]]
    ) -> list[Instances]:
        # detectron2's leaves the heads switched off where something goes wrong.
        heads = self.model.roi_heads
        switches = {name: getattr(heads, name) for name in ("mask_on",) if hasattr(heads, name)}
        try:
            return [output["instances"] for output in augmented(batch)]
        finally:
            for name, value in switches.items():
                setattr(heads, name, value)

    def _finished(self, instances: Instances) -> Instances:
        if not instances.has("pred_masks"):
            return instances
        masks = instances.pred_masks
        pasted = isinstance(masks, PastedMasks)
        if self._paste and pasted:
            instances.pred_masks = masks.to_tensor()
        elif not self._paste and not pasted:
            rles = encoded_masks(masks.cpu())
            instances.pred_masks = RunLengthMasks(rles, instances.image_size)
        return instances
