"""Every config key that this project adds, each with what it does; how a config is read.

The keys of the augmentations are in ``config_augmentation.py``.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from mask_rcnn_plus.config.augmentation_keys import add_augmentation_keys
from mask_rcnn_plus.config.reading import read_config_file, read_config_text
from mask_rcnn_plus.config.training_keys import add_training_keys
from mask_rcnn_plus.config.values import check_values
from mask_rcnn_plus.errors import UserError, did_you_mean


def add_mask_rcnn_plus_config(cfg: CfgNode) -> None:
    """Adds this project's keys, with their defaults, to a detectron2 config in place.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    # "auto" takes the GPU when there is one, else the CPU; else whatever torch.device takes
    # ("cuda:1", "cpu").
    cfg.MODEL.DEVICE = "auto"

    # Weights, images and feature maps lie in memory pixel by pixel (NHWC), as GPUs with tensor
    # cores like them; the results are the same.
    cfg.MODEL.CHANNELS_LAST = False

    # The model of MODEL.BACKBONE.NAME "build_timm_fpn_backbone" (with MODEL.FPN, its top block a
    # max pooling) or "build_timm_backbone" (without). MODEL.BACKBONE.FREEZE_AT counts stages as
    # for a ResNet: 0 trains all, 1 freezes the stem, 2 res2 as well. INPUT.FORMAT "RGB" and
    # MODEL.PIXEL_MEAN and PIXEL_STD have to be those of the pretrained weights.
    cfg.MODEL.TIMM = CfgNode()
    # A name of timm.list_models(), or with the tag of its weights one of timm.list_pretrained().
    cfg.MODEL.TIMM.NAME = "convnext_tiny"
    # Start from timm's ImageNet weights, fetched once and cached; MODEL.WEIGHTS goes before them.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Maps are named by stride: res2 4, res3 8, res4 16, res5 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Probability, in training, of dropping the last block; earlier ones linearly less.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    # Batch norms keep their statistics, scale and shift: with small batches.
    cfg.MODEL.TIMM.FREEZE_BATCH_NORM = False

    # MODEL.ROI_HEADS.NUM_CLASSES stays detectron2's key; train_net.py reads -1 in it as "as many
    # as the training set has".

    # MLPMaskHead (Mask R-CNN, table 2e): NUM_FC layers of FC_DIM, then one to a mask of
    # OUTPUT_RESOLUTION x OUTPUT_RESOLUTION a class. The paper's two have NUM_FC 2 and 3.
    cfg.MODEL.ROI_MASK_HEAD.MLP = CfgNode()
    cfg.MODEL.ROI_MASK_HEAD.MLP.NUM_FC = 2
    cfg.MODEL.ROI_MASK_HEAD.MLP.FC_DIM = 1024
    cfg.MODEL.ROI_MASK_HEAD.MLP.OUTPUT_RESOLUTION = 28

    # The generated data set of circles, squares and triangles (data/shapes.py), so that a first
    # run needs no download: NAME_train and NAME_val, written below $DETECTRON2_DATASETS on first
    # use when ENABLED.
    cfg.DATASETS.SHAPES = CfgNode()
    cfg.DATASETS.SHAPES.ENABLED = False
    cfg.DATASETS.SHAPES.NAME = "shapes"
    cfg.DATASETS.SHAPES.NUM_TRAIN = 400
    cfg.DATASETS.SHAPES.NUM_VAL = 100
    # (height, width) of every image, in pixels.
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (192, 192)
    # How the masks are written: "polygon" or "rle".
    cfg.DATASETS.SHAPES.MASK_FORMAT = "polygon"
    # How often a circle, a square and a triangle is drawn beside the others, for data with a rare
    # class: (1.0, 1.0, 0.1).
    cfg.DATASETS.SHAPES.FREQUENCIES = (1.0, 1.0, 1.0)
    # The same seed gives the same bytes.
    cfg.DATASETS.SHAPES.SEED = 0

    # INPUT: how training images are augmented.
    add_augmentation_keys(cfg)

    # SOLVER and parts of MODEL and TEST: losses, optimiser, averages, checkpoints, early stopping.
    add_training_keys(cfg)

    # What is done about errors in data sets in COCO format before training and evaluation: "strict"
    # refuses, "repair" drops or mends what is wrong and trains and evaluates on the rest, "off"
    # looks for nothing but what would end the process. `mask-rcnn-plus check-data NAME` shows all.
    cfg.DATA_CHECK = "strict"

    # Seconds that a loader's worker may take for a batch before the run ends, saved, and names it;
    # 0 waits for ever. With DATALOADER.NUM_WORKERS 0 nothing is watched.
    cfg.DATALOADER.TIMEOUT = 600

    # How many different images each process may skip because they are missing or cannot be read.
    # Each is named, and replaced by another that depends on SEED and its place alone. 0 ends the
    # run at the first.
    cfg.DATALOADER.MAX_BAD_SAMPLES = 0

    # DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler shows images of rare classes more often:
    # those of a class that is in a share f of the images sqrt(REPEAT_THRESHOLD / f) times, if that
    # is more than 1. Both keys are detectron2's, whose REPEAT_THRESHOLD 0 repeats none: set it.

    # The share of the images that DATALOADER.SAMPLER_TRAIN RandomSubsetTrainingSampler takes;
    # detectron2 0.6 reads this key without having it.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # SEED stays detectron2's key, and the order of the images and every random draw follow from
    # it: the same seed gives the same weights. Where it is -1 (the default), train_net.py draws
    # one, and a resumed run takes that of its checkpoint.

    # Boundary AP (Cheng et al. 2021, a band of 2 % of the diagonal) beside mask AP, as
    # "boundary/AP": masks that are right but for their outline count for less. It makes the scoring
    # of masks slower (README, "Evaluate"); AP of boxes and masks stays.
    cfg.TEST.BOUNDARY_AP = True

    # Each image's result goes to OUTPUT_DIR/inference/<data set>/journal as soon as there is one;
    # an evaluation that was killed goes on from there if weights, settings and json are the same by
    # SHA-256, and image files by size and time. It ends with the same figures. False keeps none.
    cfg.TEST.RESUME = True

    # How many images of each test set are drawn, prediction beside ground truth, into
    # OUTPUT_DIR/preview_<data set>.png after its evaluation. 0 draws none.
    cfg.TEST.PREVIEW_IMAGES = 6
    # Whether TensorBoard shows those pictures too, one each evaluation. (Losses and figures it has
    # anyway; detectron2's VIS_PERIOD adds training images with their proposals.)
    cfg.TEST.PREVIEW_TENSORBOARD = False

    # Evaluate a copy of the model that is made for inference alone (mask_rcnn_plus.optimize): the
    # same detections in half the time. Evaluations in the course of training make one each, of
    # the weights as they are then, which takes the memory of the weights once more.
    cfg.TEST.OPTIMIZE = CfgNode()
    cfg.TEST.OPTIMIZE.ENABLED = False
    # Of weights and maps: "fp32", "bf16" (on CPUs that have instructions for it, and GPUs) or
    # "fp16" (GPUs alone).
    cfg.TEST.OPTIMIZE.DTYPE = "fp32"
    # torch.compile the backbone and the RPN's head; the first images take minutes, and on CPUs it
    # has not paid.
    cfg.TEST.OPTIMIZE.COMPILE = False
    # On a GPU, replay the backbone as a CUDA graph for sizes of images that repeat.
    cfg.TEST.OPTIMIZE.CUDA_GRAPHS = False


def get_cfg() -> CfgNode:
    """detectron2's default config plus this project's keys.

    Returns:
        a new, unfrozen config, ready for ``merge_from_file``.
    """
    cfg = get_detectron2_cfg()
    add_mask_rcnn_plus_config(cfg)
    return cfg


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML config over the defaults, then ``KEY VALUE`` pairs over it.

    Only plain YAML is read, and nothing outside the config root: see ``config_file.py``.

    Args:
        config_file: path of a YAML file; its ``_BASE_`` is followed.
        opts: keys and values in turn, e.g. ``["SOLVER.BASE_LR", "0.01"]``.

    Returns:
        a new, unfrozen config.

    Raises:
        UserError: the file (or its ``_BASE_``) is missing, is no YAML or no mapping; a key does not
            exist, or its value has another type than the default or is out of range.
    """
    return _merged(read_config_file(str(config_file)), f"config file '{config_file}'", opts)


def parse_config(text: str, subject: str, opts: Sequence[str] = ()) -> CfgNode:
    """:func:`load_config` of a YAML config that is no file, such as a checkpoint carries.

    Args:
        text: the YAML, without ``_BASE_``.
        subject: how messages name it.
        opts: as load_config's.
    """
    return _merged(read_config_text(text, subject), subject, opts)


def _merged(values: dict[str, Any], subject: str, opts: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    known = dict(_flatten(cfg))
    # detectron2 guesses (and warns) where a file does not say; all that this project reads is v2.
    if values.pop("VERSION", 2) != 2:
        raise UserError(f"{subject} is of VERSION 1: convert it to VERSION 2")
    if isinstance(solver := values.get("SOLVER"), dict):  # saved by earlier versions
        solver.pop("ACCUMULATE_EXACT", None)
    _check_keys((key for key, _ in _flatten(values)), known, subject)
    # merge_from_file would read the file again with yaml.unsafe_load as its way out.
    with _literals(subject):
        cfg.merge_from_other_cfg(CfgNode(values))
    _merge_opts(cfg, list(opts), known)
    check_values(dict(_flatten(cfg)), known)
    return cfg


def _merge_opts(cfg: CfgNode, opts: list[str], known: Mapping[str, Any]) -> None:
    for position, item in enumerate(opts):
        if position % 2 == 0 and item.startswith("-"):
            raise UserError(f"'{item}' stands after a config override: put options before them")
    _check_keys(opts[0::2], known, "the command line")
    if len(opts) % 2:
        raise UserError(f"config key '{opts[-1]}' on the command line has no value")
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        hint = ""
        if isinstance(known[key], tuple | list) and not value.startswith(("(", "[")):
            hint = f"; it is a list: write \"('{value}',)\""
        with _literals(f"{key} {value}", hint):
            cfg.merge_from_list([key, value])


@contextmanager
def _literals(subject: str, hint: str = "") -> Iterator[None]:
    """Around yacs, which reads each string as a Python literal, compares its type and may refuse.

    Deep literals run into Python's own limits, and backslashes into warnings on standard error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{subject}: a value is nested too deeply to be read") from error
    except (ValueError, AssertionError, TypeError, AttributeError, KeyError, SyntaxError) as error:
        raise UserError(f"{subject}: {_first_line(error)}{hint}") from error


def _check_keys(keys: Iterable[str], known: Mapping[str, Any], where: str) -> None:
    groups = {key.rsplit(".", depth)[0] for key in known for depth in range(1, 1 + key.count("."))}
    for key in keys:
        if key in known:
            continue
        if key in groups:
            raise UserError(f"'{key}' in {where} is a group of keys, not a key with a value")
        raise UserError(f"{where} has the unknown key '{key}'{did_you_mean(key, known)}")


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if error.args else error).strip()
    # yacs prints types as "<class 'int'>"; a user reads "int".
    return re.sub(r"<class '([\w.]+)'>", r"\1", text.splitlines()[0] if text else repr(error))
