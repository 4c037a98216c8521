"""The model benchmark's figures as Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.model_inference import Row
from benchmarks.model_training import DATA, TrainingRow

_ORDER = (
    *("forward", "backward", "optimiser"),
    *("backbone", "FPN", "RPN head", "proposals", "box pooler", "box head", "detections"),
    *("mask pooler", "mask head", "keypoint pooler", "keypoint head", "paste, RLE", "other"),
)


def times_table(rows: Sequence[Row] | Sequence[TrainingRow], unit: str) -> list[str]:
    """Stages by side, each beside how many times as fast as the baselines the others are.

    Args:
        rows: baselines first; ours begin with "ours".
        unit: what the times are of, as "batch".
    """
    baselines = [row for row in rows if not row.side.startswith("ours")]
    ours = [row for row in rows if row.side.startswith("ours")]
    head = [f"ms a {unit}", *(row.side for row in rows)]
    head += [f"{o.side} against {b.side.split()[0]}" for o in ours for b in baselines]
    stages = {stage for row in rows for stage in row.stages}
    ordered = [stage for stage in _ORDER if stage in stages]

    def cells(name: str, of: Any) -> list[str]:
        values = {row.side: of(row) for row in rows}
        ratios = [_ratio(values[b.side], values[o.side]) for o in ours for b in baselines]
        return [name, *(_number(values[row.side]) for row in rows), *ratios]

    lines = [cells(stage, lambda row, s=stage: row.stages.get(s)) for stage in ordered]
    lines.append(cells("**total**", lambda row: row.total))
    if DATA in stages:
        lines.append(cells("loading, apart", lambda row: row.stages.get(DATA)))
    blank = [""] * len(ours) * len(baselines)
    lines.append(["images/s", *(f"{row.images_per_second:.2f}" for row in rows), *blank])
    lines.append(["peak memory, MiB", *(_number(row.peak_mib, 0) for row in rows), *blank])
    return markdown(head, lines)


def agreement_table(rows: Sequence[Row]) -> list[str]:
    """How the other sides' detections agree with the first's."""
    head = [
        f"against {rows[0].side}",
        *("detections", "matched", "score: median, largest difference"),
        *("box, px: median, largest", "mask IoU: mean, least"),
    ]
    lines = []
    for row in rows[1:]:
        one = row.agreement
        lines.append(
            [
                row.side,
                f"{one['found']} of {one['expected']}",
                str(one["matched"]),
                _pair(one["score_difference_median"], one["score_difference_largest"]),
                _pair(one["box_difference_median"], one["box_difference_largest"]),
                _pair(one["mask_iou_mean"], one["mask_iou_least"], "{:.4f}"),
            ]
        )
    return markdown(head, lines)


def loss_table(rows: Sequence[TrainingRow]) -> list[str]:
    """Losses of the first steps."""
    head = ["loss", *(f"step {n + 1}" for n in range(len(rows[0].losses))), "mean difference"]
    lines = [
        [row.side, *(f"{loss:.4f}" for loss in row.losses), f"{100 * row.loss_difference:.2f} %"]
        for row in rows
    ]
    return markdown(head, lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else "-"


def _pair(first: float | None, second: float | None, form: str = "{:.2g}") -> str:
    return "-" if first is None else f"{form.format(first)}, {form.format(second)}"
