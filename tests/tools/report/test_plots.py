"""Plots stay legible with any names; tables name their limits and changes."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from mask_rcnn_tools.report import plots
from mask_rcnn_tools.report.text import _title, change


@pytest.mark.parametrize(("letter", "max_columns"), [("W", 1), ("i", 3)])
def test_a_legend_with_long_names_stays_within_its_plot(
    letter: str, max_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_svg", lambda figure: figures.append(figure) or "")
    plots.class_precision_recall({letter * 40 + str(i): np.ones(101) for i in range(6)})
    figures[0].draw_without_rendering()
    (legend,) = figures[0].legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figures[0].bbox.width
    assert legend._ncols <= max_columns


def test_recall_at_different_limits_names_both() -> None:
    metrics = [{"max_dets": 200, "ARmax": 49.3}, {"max_dets": 100, "ARmax": 39.5}]
    assert _title("ARmax", metrics) == "AR200/100"
    assert _title("ARmax", metrics[:1]) == "AR200"
    assert _title("ARmax", [{}]) == "ARmax"


def test_a_change_has_its_sign() -> None:
    assert [change(39.5, 49.3), change(2.0, 1.0), change(1.0, 1.01)] == ["+9.8", "-1.0", "±0"]
    assert change(1.0, float("nan")) == change(None, 1.0) == ""
