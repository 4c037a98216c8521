"""All that the model benchmark runs, built before it prints a line: what does not fit ends here."""

import argparse
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from benchmarks.model_case import settle
from benchmarks.model_data import inference_images, training_batches
from benchmarks.model_sides import Inputs, Side, build_sides, stock_config
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.config.values import check_components
from mask_rcnn_plus.data import class_names
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.weights import local_weights
from mask_rcnn_plus.errors import UserError


@dataclass
class Setup:
    """What is measured.

    Attributes:
        cfg: detectron2's own config of the model.
        model: detectron2's, in evaluation mode, with the weights of all sides.
        weights: where those are from, in words.
        images: two batches, for inference.
        sides: of inference; none where it is not measured.
        batches: of training; none where it is not measured.
        data_ms: milliseconds that loading one of those takes, detectron2's way and ours.
    """

    cfg: CfgNode
    model: nn.Module
    weights: str
    images: Inputs
    sides: list[Side] = field(default_factory=list)
    batches: list[Inputs] = field(default_factory=list)
    data_ms: tuple[float, float] = (0.0, 0.0)


def read_config(arguments: argparse.Namespace) -> CfgNode:
    """detectron2's own config of the model, and a look at what the arguments name.

    Args:
        arguments: of the command line.

    Raises:
        UserError: there is no such config, file of weights or data set, or they do not go together.
    """
    cfg = load_config(arguments.config_file, arguments.opts)
    check_components(cfg)
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is '{cfg.MODEL.META_ARCHITECTURE}': the benchmark runs "
            "GeneralizedRCNN"
        )
    if arguments.weights:
        local_weights(arguments.weights)
    names = class_names(arguments.data) if arguments.data else []
    heads = cfg.MODEL.ROI_HEADS
    if heads.NUM_CLASSES == -1:
        heads.NUM_CLASSES = len(names) or 80
    if names and len(names) != heads.NUM_CLASSES:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {heads.NUM_CLASSES}, and --data {arguments.data} has "
            f"{len(names)} classes: set it to {len(names)}, or name another data set"
        )
    cfg.MODEL.DEVICE = arguments.device
    cfg.TEST.DETECTIONS_PER_IMAGE = arguments.detections
    cfg.DATALOADER.NUM_WORKERS = 0
    return stock_config(cfg)


def build(arguments: argparse.Namespace, cfg: CfgNode) -> Setup:
    """The model with its weights, the images and the sides.

    Args:
        arguments: of the command line.
        cfg: from :func:`read_config`; its least score is set, in place, where weights are random.

    Raises:
        UserError: the weights do not fit the model, a side cannot run it, or the data set has
            nothing to train on.
    """
    size = tuple(arguments.image_size)
    images = inference_images(cfg, arguments.data, arguments.batch * 2, size)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if arguments.weights:
        Checkpointer(model, strict=True).load(arguments.weights)
        weights = f"{arguments.weights}."
    else:
        threshold = settle(model, images[:1], arguments.detections)
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
        weights = f"random; the least score, {threshold:.3g}, lets candidates enough pass."
    setup = Setup(cfg, model, weights, images)
    if "inference" in arguments.mode or arguments.sweep:
        setup.sides = build_sides(
            cfg,
            model,
            against=arguments.against,
            dtypes=arguments.dtype,
            image_size=tuple(images[0]["image"].shape[1:]),
        )
    if "training" in arguments.mode:
        setup.batches, setup.data_ms = training_batches(
            cfg,
            arguments.data,
            batch=arguments.train_batch,
            batches=2,
            size=tuple(arguments.train_image_size),
        )
    return setup
