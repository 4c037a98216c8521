"""Options that need other options, or another device."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from mask_rcnn_plus.engine.ema import NAME as AVERAGED
from mask_rcnn_plus.engine.validation import NAME as VALIDATION
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.evaluation.coco import TASKS

# Of each task; AP-<class> as well.
_KINDS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# What has to be on, and the tasks that it is for.
_NEEDED = (
    ("MODEL.MASK_ON", ("segm", "boundary")),
    ("TEST.BOUNDARY_AP", ("boundary",)),
    ("MODEL.KEYPOINT_ON", ("keypoints",)),
)


def check_options(cfg: CfgNode) -> None:
    """Refuses what would have no effect, before the run starts.

    Raises:
        UserError: a figure is watched that nothing measures, or a loss is asked for that the ROI
            heads do not have.
    """
    test = cfg.TEST
    if test.LOSS_PERIOD and not cfg.DATASETS.TEST:
        raise UserError(
            f"TEST.LOSS_PERIOD is {test.LOSS_PERIOD}, and DATASETS.TEST is empty: name a data set"
        )
    _check_figure(cfg, "TEST.BEST_METRIC", test.BEST_METRIC)
    stopping = test.EARLY_STOPPING.METRIC
    _check_figure(cfg, "TEST.EARLY_STOPPING.METRIC", stopping)
    if stopping and not stopping.startswith(f"{VALIDATION}/") and not test.EVAL_PERIOD:
        raise UserError(
            f"TEST.EARLY_STOPPING.METRIC is '{stopping}', and TEST.EVAL_PERIOD 0 evaluates at the "
            "end alone: set it to a number of iterations"
        )
    head = cfg.MODEL.ROI_BOX_HEAD
    asked = {
        "LOSS_CLS": (head.LOSS_CLS, "cross_entropy"),
        "CLASS_WEIGHTS": (list(head.CLASS_WEIGHTS), []),
        "CLASS_WEIGHTING": (head.CLASS_WEIGHTING, "none"),
    }
    for key, (value, plain) in asked.items():
        name = cfg.MODEL.ROI_HEADS.NAME
        ours = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and name.startswith("Fused")
        if value != plain and not ours:
            raise UserError(
                f"MODEL.ROI_BOX_HEAD.{key} is {value}, which MODEL.ROI_HEADS.NAME '{name}' does "
                "not know: set FusedROIHeads, FusedRes5ROIHeads or FusedCascadeROIHeads"
            )


def check_optimize(cfg: CfgNode, device: str) -> None:
    """Refuses, before weights are loaded, what evaluations could not be optimised for.

    Args:
        cfg: its TEST.OPTIMIZE is looked at.
        device: of the model.

    Raises:
        UserError: TEST.OPTIMIZE.DTYPE is none for the device.
    """
    asked = cfg.TEST.OPTIMIZE
    if asked.ENABLED and asked.DTYPE == "fp16" and device == "cpu":
        raise UserError(
            "TEST.OPTIMIZE.DTYPE is 'fp16', which CPUs compute slower than fp32: set bf16 or fp32"
        )


def check_sampler(cfg: CfgNode) -> None:
    """Refuses a sampler of rare classes' images that could repeat none, before the data is read.

    Raises:
        UserError: of DATALOADER.SAMPLER_TRAIN.
    """
    loader = cfg.DATALOADER
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and not loader.REPEAT_THRESHOLD:
        raise UserError(
            "DATALOADER.SAMPLER_TRAIN is 'RepeatFactorTrainingSampler', and REPEAT_THRESHOLD 0 "
            "repeats no image: set the share of the images below which a class counts as rare, as "
            "0.001 for LVIS"
        )


def check_figures(cfg: CfgNode) -> None:
    """Refuses names of figures to watch that no evaluation of the run can have.

    Raises:
        UserError: of TEST.BEST_METRIC or TEST.EARLY_STOPPING.METRIC.
    """
    names = cfg.DATASETS.TEST
    for key, name in _watched(cfg):
        if not names:
            raise UserError(f"{key} is '{name}', and DATASETS.TEST is empty: name a data set")
        figure = name.removeprefix(f"{AVERAGED}/").removeprefix(f"{VALIDATION}/")
        if len(names) > 1:
            of = next((one for one in names if figure.startswith(f"{one}/")), None)
            if of is None:
                before = name.removesuffix(figure)
                raise UserError(
                    f"{key} is '{name}', and there are {len(names)} test sets: write of which, as "
                    f"'{before}{names[0]}/{figure}'"
                )
            figure = figure.removeprefix(f"{of}/")
        if name.startswith(f"{VALIDATION}/"):
            continue
        task, slash, kind = figure.partition("/")
        # Evaluators of the user's own may have tasks of theirs.
        if not slash or (task in TASKS and kind not in _KINDS and not kind.startswith("AP-")):
            known = [f"{task}/{kind}" for task in TASKS for kind in _KINDS]
            hint = did_you_mean(figure, known) or "; a figure's name is like segm/AP"
            raise UserError(f"{key} is '{name}', which is no figure of an evaluation{hint}")
        for needed, of in _NEEDED:
            group, switch = needed.split(".")
            plain = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
            if task in of and plain and not cfg[group][switch]:
                raise UserError(f"{key} is '{name}', and {needed} is False: set it to True")


def check_classes_watched(cfg: CfgNode, names: Sequence[str]) -> None:
    """Refuses to watch the AP of a class that there is not.

    Args:
        cfg: after :func:`check_figures`.
        names: of the classes; none where they are not known.

    Raises:
        UserError: of TEST.BEST_METRIC or TEST.EARLY_STOPPING.METRIC.
    """
    for key, name in _watched(cfg):
        task, _, of = name.partition("/AP-")
        if task.rsplit("/", 1)[-1] in TASKS and "/AP-" in name and names and of not in names:
            hint = did_you_mean(of, names) or f"; there is {', '.join(names)}"
            raise UserError(f"{key} is '{name}', and no class is called '{of}'{hint}")


def _watched(cfg: CfgNode) -> list[tuple[str, str]]:
    watched = [
        ("TEST.BEST_METRIC", cfg.TEST.BEST_METRIC),
        ("TEST.EARLY_STOPPING.METRIC", cfg.TEST.EARLY_STOPPING.METRIC),
    ]
    return [(key, name) for key, name in watched if name]


def _check_figure(cfg: CfgNode, key: str, name: str) -> None:
    if name.startswith(f"{VALIDATION}/") and not cfg.TEST.LOSS_PERIOD:
        raise UserError(
            f"{key} is '{name}', and TEST.LOSS_PERIOD 0 measures no losses: set it to a number of "
            "iterations"
        )
    if name.startswith(f"{AVERAGED}/") and not cfg.SOLVER.EMA.ENABLED:
        raise UserError(f"{key} is '{name}': set SOLVER.EMA.ENABLED True")
