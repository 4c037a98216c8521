"""Every config key that this project adds, with its default and its meaning."""

import functools
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg


def get_cfg() -> CfgNode:
    """Returns detectron2's default config plus this project's keys, unfrozen."""
    cfg = get_detectron2_cfg()
    add_mask_rcnn_plus_config(cfg)
    return cfg


def complete(cfg: CfgNode) -> CfgNode:
    """Returns a config in which every key that it lacks has its default.

    Programs that build their config with detectron2's own ``get_cfg`` do not have this project's
    keys. Everything that reads these keys from a caller's config calls this first.

    Returns:
        the config itself if it has all keys; otherwise a copy, frozen if the config is.
    """
    defaults = get_cfg()
    if _has_all(cfg, defaults):
        return cfg
    copy = cfg.clone()
    copy.defrost()
    _fill(copy, defaults)
    if cfg.is_frozen():
        copy.freeze()
    return copy


def with_values(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """A copy of a config with other values, frozen if the config is.

    The only place that changes a config after setup: a copy for functions that read a setting from
    the config and have no argument for it.

    Args:
        cfg: not modified.
        values: by full key, such as ``{"MODEL.DEVICE": "cpu"}``.
    """
    copy = cfg.clone()
    copy.defrost()
    for key, value in values.items():
        *groups, name = key.split(".")
        functools.reduce(getattr, groups, copy)[name] = value
    if cfg.is_frozen():
        copy.freeze()
    return copy


def _has_all(node: CfgNode, defaults: CfgNode) -> bool:
    return all(
        key in node and (not isinstance(value, CfgNode) or _has_all(node[key], value))
        for key, value in defaults.items()
    )


def _fill(node: CfgNode, defaults: CfgNode) -> None:
    for key, value in defaults.items():
        if key not in node:
            node[key] = value
        elif isinstance(value, CfgNode):
            _fill(node[key], value)


def add_mask_rcnn_plus_config(cfg: CfgNode) -> None:
    """Adds this project's keys, with their defaults, to a detectron2 config in place."""
    _add_model_keys(cfg)
    _add_data_keys(cfg)
    _add_augmentation_keys(cfg)
    _add_training_keys(cfg)
    _add_test_keys(cfg)


def _add_model_keys(cfg: CfgNode) -> None:
    # "auto" is the GPU if there is one, else the CPU. Otherwise anything that torch.device accepts,
    # such as "cuda:1" or "cpu".
    cfg.MODEL.DEVICE = "auto"

    # Keep weights, images and feature maps in channels_last (NHWC) memory, which suits GPUs with
    # tensor cores. The results are the same.
    cfg.MODEL.CHANNELS_LAST = False

    # The model for MODEL.BACKBONE.NAME "build_timm_fpn_backbone" (with MODEL.FPN and max pooling on
    # top) or "build_timm_backbone" (without). MODEL.BACKBONE.FREEZE_AT counts stages as for a
    # ResNet: 0 trains all, 1 freezes the stem, 2 also res2. INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN
    # and MODEL.PIXEL_STD must suit the pretrained weights.
    cfg.MODEL.TIMM = CfgNode()
    # A name from timm.list_models(), or from timm.list_pretrained() with the tag of its weights.
    cfg.MODEL.TIMM.NAME = "convnext_tiny"
    # Start from timm's ImageNet weights, downloaded once. MODEL.WEIGHTS takes precedence.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Maps are named by stride: res2 4, res3 8, res4 16, res5 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # The probability, in training, of dropping the last block; it falls linearly towards the first.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    # Batch norms keep their statistics, scale and shift. Useful with small batches.
    cfg.MODEL.TIMM.FREEZE_BATCH_NORM = False

    # MODEL.ROI_HEADS.NUM_CLASSES is detectron2's key; train_net.py reads -1 as "as many as the
    # training set has". In the same way, -1, or a list of -1, means "from the training data" for
    # SOLVER.MAX_ITER, STEPS, WARMUP_ITERS and CHECKPOINT_PERIOD; TEST.EVAL_PERIOD and
    # DETECTIONS_PER_IMAGE; INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TEST, MAX_SIZE_TEST and
    # CROP.SIZE; MODEL.ANCHOR_GENERATOR.SIZES; DATALOADER.REPEAT_THRESHOLD. The run logs the values
    # with their reasons, and saves them in config.yaml (docs/auto_settings.md).

    # MLPMaskHead (Mask R-CNN, table 2e): NUM_FC layers of FC_DIM, then one layer that predicts a
    # mask of OUTPUT_RESOLUTION x OUTPUT_RESOLUTION per class. The paper has NUM_FC 2 and 3.
    cfg.MODEL.ROI_MASK_HEAD.MLP = CfgNode()
    cfg.MODEL.ROI_MASK_HEAD.MLP.NUM_FC = 2
    cfg.MODEL.ROI_MASK_HEAD.MLP.FC_DIM = 1024
    cfg.MODEL.ROI_MASK_HEAD.MLP.OUTPUT_RESOLUTION = 28


def _add_data_keys(cfg: CfgNode) -> None:
    # The generated data set of circles, squares and triangles (data/shapes.py), for a first run
    # without a download. ENABLED writes NAME_train and NAME_val below $DETECTRON2_DATASETS once.
    cfg.DATASETS.SHAPES = CfgNode()
    cfg.DATASETS.SHAPES.ENABLED = False
    cfg.DATASETS.SHAPES.NAME = "shapes"
    cfg.DATASETS.SHAPES.NUM_TRAIN = 400
    cfg.DATASETS.SHAPES.NUM_VAL = 100
    # (height, width) of every image, in pixels.
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (192, 192)
    # How masks are stored: "polygon" or "rle".
    cfg.DATASETS.SHAPES.MASK_FORMAT = "polygon"
    # Relative frequencies of circles, squares and triangles. (1.0, 1.0, 0.1) makes a rare class.
    cfg.DATASETS.SHAPES.FREQUENCIES = (1.0, 1.0, 1.0)
    # The same seed gives the same files, byte for byte.
    cfg.DATASETS.SHAPES.SEED = 0

    # INPUT.FORMAT is detectron2's key; here it is "BGR", "RGB" or "L" (grey).

    # How grey images of 16 or 32 bits become 8 bits, in training, evaluation and prediction.
    # "image" scales from the smallest to the largest value of each image. "full" scales from 0 to
    # 65535, which keeps the brightness of images comparable; it refuses 32 bits. A range such as
    # "0..4095" (12 bits) or "-1000..400" scales from one value to the other. Colours of 16 bits are
    # always reduced to their upper 8 bits, because Pillow reads only these.
    cfg.INPUT.SIXTEEN_BIT = "image"

    # The largest image, in pixels, against files that would fill the memory. 0 is Pillow's limit,
    # 178,956,970. An image takes about 7 bytes per pixel while it is read, in each loader worker.
    cfg.INPUT.MAX_PIXELS = 0

    # How to handle problems in COCO data sets before training and evaluation. "strict" refuses
    # them; "repair" repairs or removes them; "off" checks only for what would crash the process.
    # `mask-rcnn-plus check-data NAME` lists all problems.
    cfg.DATA_CHECK = "strict"

    # Seconds that a loader worker may need for a batch; 0 for no limit. After that, the run saves a
    # checkpoint, names the images and ends. It has no effect with DATALOADER.NUM_WORKERS 0.
    cfg.DATALOADER.TIMEOUT = 600

    # How many different missing or unreadable images each process may skip; 0 ends the run at the
    # first. The log names each one; its replacement depends only on SEED and the position.
    cfg.DATALOADER.MAX_BAD_SAMPLES = 0

    # DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler shows images of rare classes more often:
    # sqrt(REPEAT_THRESHOLD / f) times for a class in a share f of the images, if that exceeds 1.
    # Both keys are detectron2's; its default REPEAT_THRESHOLD 0 repeats nothing, so set it.

    # The share of the images that SAMPLER_TRAIN RandomSubsetTrainingSampler uses. detectron2 0.6
    # reads this key but does not define it.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # SEED is detectron2's key. It determines the order of the images and every random draw: the
    # same seed gives the same weights. With -1 (the default) train_net.py draws a seed; a resumed
    # run takes the seed of its checkpoint.


def _add_augmentation_keys(cfg: CfgNode) -> None:
    # By default nothing below changes an image. Every draw depends only on SEED and the image's
    # position in the order of the images. ``mask-rcnn-plus show-data`` draws the results.

    # Large-scale jitter, in place of MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and INPUT.CROP: resizes by a
    # factor drawn uniformly from SCALE, crops a random window of SIZE from a larger image, and pads
    # a smaller one with grey on the right and below.
    cfg.INPUT.JITTER = CfgNode()
    cfg.INPUT.JITTER.ENABLED = False
    # At factor 1 the image just fits into SIZE.
    cfg.INPUT.JITTER.SCALE = (0.1, 2.0)
    # (height, width) of every training image, in pixels. () means a square that suits the other
    # sizes: its side is 1.28 times the largest MIN_SIZE_TRAIN (for COCO's 800 that is 1024), at
    # most MAX_SIZE_TRAIN, rounded to a multiple of 32.
    cfg.INPUT.JITTER.SIZE = ()

    # Random colours: each factor is drawn uniformly from 1 - x to 1 + x. 0 changes nothing.
    cfg.INPUT.COLOR = CfgNode()
    cfg.INPUT.COLOR.BRIGHTNESS = 0.0
    cfg.INPUT.COLOR.CONTRAST = 0.0
    cfg.INPUT.COLOR.SATURATION = 0.0
    # AlexNet's shift along the principal colours of ImageNet: the standard deviation, in grey
    # levels. 25.5 corresponds to 0.1 for images from 0 to 1.
    cfg.INPUT.COLOR.LIGHTING = 0.0

    # Gaussian blur with this probability; sigma in pixels is drawn uniformly from SIGMA.
    cfg.INPUT.BLUR = CfgNode()
    cfg.INPUT.BLUR.PROB = 0.0
    cfg.INPUT.BLUR.SIGMA = (0.1, 2.0)

    # Copy-paste: with this probability, objects of a second, also augmented, training image are
    # pasted onto an image. Masks below lose what is covered. All masks become bitmaps, whatever
    # INPUT.MASK_FORMAT is.
    cfg.INPUT.COPY_PASTE = CfgNode()
    cfg.INPUT.COPY_PASTE.PROB = 0.0
    # The number of pasted objects is drawn uniformly from 1 to this or to all, if there are fewer.
    cfg.INPUT.COPY_PASTE.MAX_OBJECTS = 20


def _add_training_keys(cfg: CfgNode) -> None:
    # Each default below does what detectron2 does.

    # Frozen parts: names of modules or parameters, each from the start of the full name to a
    # dot or its end, with shell wildcards, such as ["backbone.bottom_up.stem",
    # "proposal_generator"] or ["backbone.bottom_up.res[2-4]"]. Frozen batch norms keep their
    # statistics, and frozen dropout drops nothing. The run logs what it froze.
    cfg.MODEL.FREEZE = []

    # The classification loss of this project's ROI heads (C4 and Cascade included):
    # "cross_entropy", or "focal" (arXiv:1708.02002 over the softmax, without alpha), which weights
    # a RoI by (1 - p) ** FOCAL_GAMMA, where p is the probability of the right class.
    cfg.MODEL.ROI_BOX_HEAD.LOSS_CLS = "cross_entropy"
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA = 2.0
    # A factor per class, in the order of class ids, for the classification loss of its RoIs; one
    # more is for the background (else 1). At least two must be above 0. [] means 1 for all.
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS = []
    # "inverse_frequency" makes train_net.py set CLASS_WEIGHTS to N / (K * n): n of the N objects in
    # DATASETS.TRAIN belong to the class, and there are K classes. The run's saved config has the
    # numbers.
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING = "none"

    # "SGD" is detectron2's (with SOLVER.MOMENTUM and NESTEROV). "ADAMW" needs far fewer iterations
    # from random weights; use a BASE_LR of about 0.001 and a WEIGHT_DECAY of about 0.05.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # Update all weights in one kernel, which rounds slightly differently from detectron2's loop.
    cfg.SOLVER.FUSED = False

    # The type that SOLVER.AMP.ENABLED computes in: "fp16" as in detectron2 (CUDA only, with a
    # scaled loss), or "bf16", which needs no scaling and also runs on CPUs.
    cfg.SOLVER.AMP.DTYPE = "fp16"

    # Gradient accumulation: a batch of SOLVER.IMS_PER_BATCH is computed in this many parts, one
    # after the other, in the memory of one part. As with several GPUs, each part samples its own
    # anchors and RoIs, and its losses are means over these.
    cfg.SOLVER.ACCUMULATE_STEPS = 1

    # The SOLVER.IMS_PER_BATCH that BASE_LR and the numbers of iterations are meant for. With
    # another batch size the learning rate is multiplied by their ratio, and MAX_ITER, STEPS,
    # WARMUP_ITERS, CHECKPOINT_PERIOD, TEST.EVAL_PERIOD and TEST.LOSS_PERIOD are divided by it
    # (arXiv:1706.02677); the run logs the result. 0 scales nothing. (detectron2's
    # REFERENCE_WORLD_SIZE is different: it makes the batch grow with the number of processes.)
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0

    # An exponential moving average of the weights and batch norm statistics, saved in
    # model_ema_final.pth. Each evaluation covers both sets of weights (metrics "segm/AP" and
    # "ema/segm/AP", files below OUTPUT_DIR/ema).
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # At step t, counted from 1, the average keeps the share min(DECAY, (1 + t) / (WARMUP + t)).
    # With WARMUP 1 that is DECAY from the first step.
    cfg.SOLVER.EMA.DECAY = 0.999
    cfg.SOLVER.EMA.WARMUP = 10.0

    # How many of the newest periodic checkpoints (every SOLVER.CHECKPOINT_PERIOD iterations) to
    # keep, besides model_final.pth and model_best.pth. 0 keeps all.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0

    # Services that receive the metrics besides TensorBoard: "wandb" and "mlflow", each a package of
    # its own. Their environment variables apply, such as WANDB_MODE=offline.
    cfg.SOLVER.LOGGERS = []


def _add_test_keys(cfg: CfgNode) -> None:
    # The metric that selects OUTPUT_DIR/model_best.pth, such as "segm/AP"; with several test sets
    # "NAME/segm/AP"; "validation/total_loss" (needs TEST.LOSS_PERIOD); "ema/segm/AP" (needs
    # SOLVER.EMA), which saves the averaged weights as model_ema_best.pth. Compared every
    # TEST.EVAL_PERIOD iterations (a loss: LOSS_PERIOD) and at the end. "" saves no such file.
    cfg.TEST.BEST_METRIC = ""
    # "max": larger is better; "min": smaller is better; "auto": "min" if the name contains "loss".
    cfg.TEST.BEST_MODE = "auto"

    # Every this many iterations, and at the end, compute the training losses on the test sets, one
    # image at a time at test size, unaugmented: "validation/loss_mask", ...,
    # "validation/total_loss" (with several test sets "validation/NAME/..."). Norms and dropout work
    # as in evaluation, and the sampled RoIs depend only on the image. Training is not affected.
    # 0 turns it off. (detectron2 writes the latest value of each metric every 20 iterations.)
    cfg.TEST.LOSS_PERIOD = 0
    # The number of images per test set, evenly spaced. 0 uses all.
    cfg.TEST.LOSS_IMAGES = 0

    # End the run, with a final checkpoint and evaluation, when METRIC (named as in BEST_METRIC; ""
    # turns it off) has not improved by more than MIN_DELTA in PATIENCE comparisons in a row, one
    # every TEST.EVAL_PERIOD iterations (a validation loss: LOSS_PERIOD). MODE as BEST_MODE.
    cfg.TEST.EARLY_STOPPING = CfgNode()
    cfg.TEST.EARLY_STOPPING.METRIC = ""
    cfg.TEST.EARLY_STOPPING.MODE = "auto"
    cfg.TEST.EARLY_STOPPING.PATIENCE = 5
    cfg.TEST.EARLY_STOPPING.MIN_DELTA = 0.0

    # Also compute boundary AP (Cheng et al. 2021, with a band of 2 % of the diagonal), as
    # "boundary/AP". It counts masks with a wrong outline for less. Scoring masks takes longer
    # (docs/evaluation.md); box and mask AP are unchanged.
    cfg.TEST.BOUNDARY_AP = True

    # Write each image's result to OUTPUT_DIR/inference/<data set>/journal at once. A killed
    # evaluation continues from there if weights, settings and json have the same SHA-256 and the
    # image files the same size and time. The final metrics are the same. False writes no journal.
    cfg.TEST.RESUME = True

    # How many images of each test set to draw, prediction beside ground truth, in
    # OUTPUT_DIR/preview_<data set>.png after its evaluation. 0 draws none.
    cfg.TEST.PREVIEW_IMAGES = 6
    # Also show these pictures in TensorBoard, one per evaluation. (Losses and metrics are there in
    # any case; detectron2's VIS_PERIOD adds training images with their proposals.)
    cfg.TEST.PREVIEW_TENSORBOARD = False

    # Evaluate a copy of the model that is optimized for inference (mask_rcnn_plus.optimize): the
    # same detections in half the time. Each evaluation during training makes such a copy, which
    # needs memory for the weights a second time.
    cfg.TEST.OPTIMIZE = CfgNode()
    cfg.TEST.OPTIMIZE.ENABLED = False
    # The type of weights and maps: "fp32", "bf16" (GPUs, and CPUs with instructions for it) or
    # "fp16" (GPUs only).
    cfg.TEST.OPTIMIZE.DTYPE = "fp32"
    # torch.compile the backbone and the RPN head. The first images take minutes; on CPUs it has not
    # paid off.
    cfg.TEST.OPTIMIZE.COMPILE = False
    # On a GPU, replay the backbone as a CUDA graph for image sizes that repeat (the first four).
    cfg.TEST.OPTIMIZE.CUDA_GRAPHS = False
