"""The data check before training and evaluation, as DATA_CHECK asks for."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from mask_rcnn_plus.data import coco_files, use_json
from mask_rcnn_plus.data.coco_json import file_stamp, mark_vetted
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_tools.check import (
    ERROR,
    WARNING,
    AnchorSettings,
    Report,
    check_coco,
    describe,
    mend,
    note_leaks,
    write_whole,
)

# Below the plugin's logger, whose handlers write the console and log.txt of a run.
logger = logging.getLogger("mask_rcnn_plus.data_check")

_CHOICES = ("strict", "repair", "off")
# What loading refuses in better words than a count of problems would.
_LEFT_TO_LOADING = {"no-json", "no-coco", "no-images", "file-missing"}


def check_data(cfg: CfgNode, names: Sequence[str]) -> None:
    """Checks data sets in COCO format; those of other kinds are passed over.

    With several processes, the first of each machine checks and all of them follow it.

    Args:
        cfg: the config; DATA_CHECK "strict" refuses what has an error, "repair" lets the data sets
            (and their evaluation) use mended jsons in OUTPUT_DIR/data_check, "off" does nothing.
        names: data sets that will be used.

    Raises:
        UserError: DATA_CHECK is none of these, or there are errors that it does not let pass.
    """
    choice = cfg.DATA_CHECK
    if choice not in _CHOICES:
        hint = did_you_mean(str(choice), _CHOICES) or ""
        raise UserError(f"DATA_CHECK is '{choice}': set it to strict, repair or off{hint}")
    if choice == "off":
        return
    files = {name: found for name in names if (found := coco_files(name))}

    def check() -> dict[str, Path]:
        reports = [
            check_coco(*found, name=name, anchors=anchor_settings(cfg))
            for name, found in files.items()
        ]
        note_leaks(reports)
        return {
            report.name: path
            for report in reports
            if (path := _judge(cfg, report, choice)) is not None
        }

    for name, path in _on_each_machine(check).items():
        use_json(name, path)
        logger.warning(
            f"Data set '{name}' is read from the mended '{path}' (DATA_CHECK repair); where it is "
            "evaluated on, that is the ground truth"
        )


def anchor_settings(cfg: CfgNode) -> AnchorSettings | None:
    """What the config's anchors and resizing come to; None without anchors, and with jitter, whose
    sizes ``mask-rcnn-plus fit-anchors`` follows."""
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    sizes = [float(size) for level in anchors.SIZES for size in _listed(level)]
    ratios = sorted({float(ratio) for level in anchors.ASPECT_RATIOS for ratio in _listed(level)})
    shorter = sorted(_listed(cfg.INPUT.MIN_SIZE_TRAIN))
    if not sizes or not ratios or not shorter or cfg.INPUT.JITTER.ENABLED:
        return None
    return AnchorSettings(
        sizes, ratios, int(shorter[len(shorter) // 2]), int(cfg.INPUT.MAX_SIZE_TRAIN)
    )


def _judge(cfg: CfgNode, report: Report, choice: str) -> Path | None:
    """Logs what was found; the mended json where one is needed."""
    _log(report)
    errors = report.kinds(ERROR)
    if not cfg.MODEL.MASK_ON:
        del errors["mask-missing"]
    if not report.is_coco() or (choice == "strict" and errors.keys() <= _LEFT_TO_LOADING):
        return None
    if not errors:
        return None
    command = f"mask-rcnn-plus check-data {report.name}"
    if choice == "strict":
        first = next(problem for problem in report.problems if problem.kind in errors)
        raise UserError(
            f"data set '{report.name}' ('{report.json_file}') has {errors.total()} "
            f"error{'s' if errors.total() > 1 else ''} ({_counts(errors)}): {describe(first)}. "
            f"`{command}` lists all; DATA_CHECK repair trains without them"
        )
    repaired = mend(report)
    if repaired.left:
        kinds = Counter(problem.kind for problem in repaired.left)
        raise UserError(
            f"data set '{report.name}': DATA_CHECK repair cannot mend {_counts(kinds)}; "
            f"`{command}` says more"
        )
    path = Path(cfg.OUTPUT_DIR, "data_check", f"{report.name}.json").absolute()
    try:
        write_whole(path, repaired.text())
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    if stamp := file_stamp(path):
        mark_vetted(stamp, repaired.content["categories"])
    logger.warning(f"Data set '{report.name}': the mended json {repaired.summary()}")
    return path


def _log(report: Report) -> None:
    if warnings := report.kinds(WARNING):
        logger.warning(
            f"Data set '{report.name}': {_counts(warnings)}; "
            f"`mask-rcnn-plus check-data {report.name}` explains them"
        )
    for line in report.statistics:
        logger.info(f"Data set '{report.name}': {line}")


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _listed(value: object) -> list:
    return list(value) if isinstance(value, Sequence) else [value]


def _on_each_machine(work: Callable[[], dict[str, Path]]) -> dict[str, Path]:
    """What the first process of this machine makes of it, or its UserError, for all processes."""
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
    mine = comm.get_rank() - comm.get_local_rank()
    result = outcomes[mine]
    assert not isinstance(result, UserError)
    return result
