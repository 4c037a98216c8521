"""Plots stay legible with any names; tables name their limits and changes."""

import base64
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from mask_rcnn_plus.evaluation.metrics import COLUMNS
from mask_rcnn_tools.report import plots
from mask_rcnn_tools.report.metrics import confusion_matrix
from mask_rcnn_tools.report.run import read_run
from mask_rcnn_tools.report.text import _title, change, confusions, per_class
from tests.tools.report.conftest import MakeRun


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


@pytest.mark.filterwarnings("error")  # a name that the fonts here lack is no reason to warn
def test_a_plot_of_hostile_names_is_valid_xml() -> None:
    names = ("a\x00b", "\ud800", "\x1b[2J", "<&>", "_", "猫")
    source = plots.class_precision_recall({name: np.ones(101) for name in names})
    svg = base64.b64decode(source.split(",", 1)[1]).decode("utf-8")
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert r"a\x00b" in text and r"\ud800" in text and "<&>" in text


def test_the_matrix_and_the_table_leave_out_classes_that_never_occur(make_run: MakeRun) -> None:
    classes = tuple(f"class {k}" for k in range(20))
    box = [5.0, 5, 20, 20]
    folder = make_run("run", [(1, 9, box, 0.9)], objects=[(1, 5, box)] * 2, classes=classes)
    counts = {f"class {k}": (2 * (k == 4), int(k == 8)) for k in range(20)}
    rows = [f"bbox,1,{name},{'1,' * 12}100,{n},{d}" for name, (n, d) in counts.items()]
    summary = folder / "inference/mine_val/summary.csv"
    summary.write_text("\n".join([",".join(COLUMNS), *rows]))
    run = read_run(folder, label="run")
    (table,) = per_class(run)
    assert [name for name, _ in table["rows"]] == ["class 4", "class 8"]
    assert len(table["empty"]) == 18
    matrix = confusions(confusion_matrix(run.analysis, "bbox", 0.5), classes)
    assert matrix["columns"] == ["class 4", "class 8", "nothing"]
    assert ("class 4", "class 8", 1) in matrix["pairs"]
