"""The data check before training and evaluation, according to DATA_CHECK."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from mask_rcnn_plus.config.values import is_auto
from mask_rcnn_plus.data import coco_files, use_json
from mask_rcnn_plus.data.coco_json import file_stamp, mark_vetted
from mask_rcnn_plus.errors import UserError, did_you_mean, reason
from mask_rcnn_tools.check.checking import check_coco, note_leaks, repair_coco
from mask_rcnn_tools.check.problems import ERROR, WARNING
from mask_rcnn_tools.check.result import CheckResult, counted, describe
from mask_rcnn_tools.check.statistics import AnchorSettings
from mask_rcnn_tools.files import write_atomically

# Below the plugin's logger, whose handlers write to the console and to the run's log.txt.
logger = logging.getLogger("mask_rcnn_plus.data_check")

_CHOICES = ("strict", "repair", "off")
# Annotations of these kinds are not evaluated, and neither they nor the next ones trained on.
_CROWDS = ("crowd-brush", "crowd")
_NOT_TRAINED_ON = (*_CROWDS, "mask-empty", "box-empty")
# Not errors, but a repair makes more objects or images usable.
_WORTH_A_REPAIR = {"crowd-brush", "crowd-type", "file-renamed"}
# For these kinds, loading the data set raises a clearer error than the check could.
_LEFT_TO_LOADING = {"no-json", "no-coco", "no-images", "file-missing"}


def check_data(cfg: CfgNode, names: Sequence[str]) -> None:
    """Checks data sets in COCO format; ignores other data sets.

    With several processes, the first one of each machine checks, and the others use its result.

    Args:
        cfg: the config. DATA_CHECK "strict" refuses data sets with errors; "repair" writes repaired
            jsons into OUTPUT_DIR/data_check and uses them for training and evaluation; "off" does
            nothing.
        names: the data sets that the run uses.

    Raises:
        UserError: DATA_CHECK is invalid, or a data set has errors that it does not accept.
    """
    choice = cfg.DATA_CHECK
    if choice not in _CHOICES:
        hint = did_you_mean(str(choice), _CHOICES)
        raise UserError(f"DATA_CHECK: expected strict, repair or off, got '{choice}'{hint}")
    if choice == "off":
        return

    def check() -> dict[str, Path]:
        """The repaired json of each data set that needs one."""
        results = []
        for name in dict.fromkeys(names):
            if files := coco_files(name):
                results.append(check_coco(*files, name=name, anchors=anchor_settings(cfg)))
            else:
                logger.info(f"Data set '{name}' is not checked: it is not in COCO format")
            if name in cfg.DATASETS.TRAIN and name in cfg.DATASETS.TEST:
                logger.warning(
                    f"Data set '{name}' is in DATASETS.TRAIN and in DATASETS.TEST: its AP says "
                    "nothing about new images"
                )
        note_leaks(results)
        repaired = {result.name: _accept(cfg, result) for result in results}
        return {name: path for name, path in repaired.items() if path is not None}

    for name, path in _on_each_machine(check).items():
        use_json(name, path)
        logger.warning(
            f"Data set '{name}': training and evaluation use the repaired json '{path}' "
            "(DATA_CHECK repair), also as ground truth"
        )


def anchor_settings(cfg: CfgNode) -> AnchorSettings | None:
    """The anchors and the resizing of a config.

    Returns:
        None without anchors, with anchors or sizes from the data (-1), and with jitter, for which
        ``mask-rcnn-plus fit-anchors`` does the same.
    """
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    sizes = [float(size) for level in anchors.SIZES for size in _as_list(level)]
    ratios = sorted({float(ratio) for level in anchors.ASPECT_RATIOS for ratio in _as_list(level)})
    shorter = sorted(_as_list(cfg.INPUT.MIN_SIZE_TRAIN))
    auto = is_auto(anchors.SIZES) or is_auto(cfg.INPUT.MIN_SIZE_TRAIN)
    if not sizes or not ratios or not shorter or cfg.INPUT.JITTER.ENABLED or auto:
        return None
    return AnchorSettings(
        sizes, ratios, int(shorter[len(shorter) // 2]), int(cfg.INPUT.MAX_SIZE_TRAIN)
    )


def _accept(cfg: CfgNode, result: CheckResult) -> Path | None:
    """Logs a result, and raises UserError or writes a repaired json if the data set needs it."""
    command = f"mask-rcnn-plus check-data {result.name}"
    if warnings := result.kinds(WARNING):
        logger.warning(f"Data set '{result.name}': {counted(warnings)}; `{command}` explains them")
    _log_left_out(cfg, result)
    for problem in result.problems:
        if problem.kind == "leak-all":
            logger.warning(f"Data set '{result.name}': {problem.detail}")
    for line in result.statistics:
        logger.info(f"Data set '{result.name}': {line}")
    errors = result.kinds(ERROR)
    if not cfg.MODEL.MASK_ON:
        del errors["mask-missing"]
    strict = cfg.DATA_CHECK == "strict"
    needed = errors or (not strict and result.kinds().keys() & _WORTH_A_REPAIR)
    if not needed or not result.is_coco() or (strict and errors.keys() <= _LEFT_TO_LOADING):
        return None
    if strict:
        first = next(problem for problem in result.problems if problem.kind in errors)
        raise UserError(
            f"data set '{result.name}' ('{result.json_file}') has {errors.total()} "
            f"error{'s' if errors.total() > 1 else ''} ({counted(errors)}), first: "
            f"{describe(first)}; `{command}` lists all of them, DATA_CHECK repair repairs them"
        )
    repaired = repair_coco(result)
    if repaired.left:
        kinds = Counter(problem.kind for problem in repaired.left)
        raise UserError(
            f"data set '{result.name}': DATA_CHECK repair cannot repair {counted(kinds)}; "
            f"`{command}` explains the problems"
        )
    if lost := repaired.lost():
        raise UserError(f"data set '{result.name}': DATA_CHECK repair {lost}; see `{command}`")
    path = Path(cfg.OUTPUT_DIR, "data_check", f"{result.name}.json").absolute()
    try:
        write_atomically(path, repaired.text())
    except OSError as error:
        raise UserError(f"cannot write '{path}': {reason(error)}") from error
    if stamp := file_stamp(path):
        mark_vetted(stamp, repaired.content["categories"])
    logger.warning(f"Data set '{result.name}': the repaired json {repaired.summary()}")
    return path


def _log_left_out(cfg: CfgNode, result: CheckResult) -> None:
    """Counts the annotations and images that training leaves out, or evaluation does not count."""
    training = result.name in cfg.DATASETS.TRAIN
    kinds = _NOT_TRAINED_ON if training else _CROWDS
    if left_out := {p.position for p in result.problems if p.kind in kinds}:
        brushes = result.kinds()["crowd-brush"]
        hint = f"; DATA_CHECK repair makes {brushes} of them objects" if brushes else ""
        logger.warning(
            f"Data set '{result.name}': {len(left_out)} of {result.annotations} annotations are "
            f"not {'trained on' if training else 'evaluated'}{hint}"
        )
    empty = sum(problem.kind in ("image-empty", "crowd-only") for problem in result.problems)
    if empty and training and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        logger.info(
            f"Data set '{result.name}': {empty} of {result.images} images have no object and are "
            "not trained on; DATALOADER.FILTER_EMPTY_ANNOTATIONS False uses them as background"
        )


def _as_list(value: object) -> list:
    return list(value) if isinstance(value, Sequence) else [value]


def _on_each_machine(work: Callable[[], dict[str, Path]]) -> dict[str, Path]:
    """Runs a function in the first process of each machine; all processes get their machine's
    result, or raise the first machine's UserError."""
    outcome: dict[str, Path] | UserError = {}
    if comm.get_local_rank() == 0:
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcomes = comm.all_gather(outcome)
    for other in outcomes:
        if isinstance(other, UserError):
            raise other
    return outcomes[comm.get_rank() - comm.get_local_rank()]
