"""curves.png: what is drawn of a run's metrics.json, and that drawing never costs the run."""

import errno
import json
import logging
from pathlib import Path

import cv2
import matplotlib
import pytest

from mask_rcnn_plus.engine import curves, saving
from mask_rcnn_plus.engine.curves import CURVES, panels, read_metrics, write_curves


def _lines(first: int, last: int, loss: float) -> list[str]:
    return [
        json.dumps({"iteration": i, "lr": 0.1, "total_loss": loss, "loss_mask": loss / 2})
        for i in range(first, last, 20)
    ]


def test_the_last_pass_over_an_iteration_counts() -> None:
    restarted = "\n".join(_lines(19, 200, 3.0) + _lines(19, 80, 1.0))
    rows = read_metrics(restarted)
    assert [row["iteration"] for row in rows] == [19, 39, 59, 79]
    assert {row["total_loss"] for row in rows} == {1.0}
    resumed = read_metrics("\n".join(_lines(19, 100, 3.0) + _lines(59, 140, 1.0)))
    assert [row["total_loss"] for row in resumed] == [3.0] * 2 + [1.0] * 5


def test_metrics_that_are_written_later_than_losses_are_kept() -> None:
    text = "\n".join([*_lines(19, 60, 3.0), '{"iteration": 49, "segm/AP": 7.5}'])
    rows = read_metrics(text)
    assert [row["iteration"] for row in rows] == [19, 39, 49, 59]
    assert rows[2]["segm/AP"] == 7.5


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", '{"iteration": "7"}', '{"iteration": 1e400}', '{"lr": 1}', "[" * 99999]
)
def test_damaged_lines_are_skipped(line: str) -> None:
    assert len(read_metrics("\n".join([*_lines(19, 60, 1.0), line]))) == 3


def test_values_that_are_not_finite_leave_gaps() -> None:
    rows = read_metrics('{"iteration": 19, "lr": 0.1, "total_loss": NaN, "loss_mask": Infinity}')
    assert rows == [{"iteration": 19.0, "lr": 0.1}]


def test_ap_is_drawn_if_it_was_measured_more_than_once() -> None:
    once = [{"iteration": 19.0, "segm/AP": 3.0, "total_loss": 1.0, "validation/total_loss": 2.0}]
    twice = [*once, {"iteration": 39.0, "segm/AP": 5.0}]
    assert [panel.title for panel in panels(once)] == ["Training losses", "Validation losses"]
    (ap,) = (panel for panel in panels(twice) if panel.ylabel == "AP")
    assert ap.lines == {"segm/AP": ([19.0, 39.0], [3.0, 5.0])}


def test_a_place_without_a_plot_stays_empty(tmp_path: Path) -> None:
    lines = [
        *_lines(19, 100, 3.0),
        '{"iteration": 29, "segm/AP": 2}',
        '{"iteration": 49, "segm/AP": 7}',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    write_curves(tmp_path)
    picture = cv2.imread(str(tmp_path / CURVES))
    height, width, _ = picture.shape
    below = picture[height // 2 + 20 :]
    quarters = below[:, : width // 2], below[:, width // 2 + 20 :]
    assert [int(quarter.min()) == 255 for quarter in quarters] == [False, True]


def test_a_picture_is_drawn_and_matplotlib_stays_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    (tmp_path / "metrics.json").write_text("\n".join(_lines(19, 2000, 1.0)), encoding="utf-8")
    write_curves(tmp_path)
    picture = cv2.imread(str(tmp_path / CURVES))
    assert picture.shape[1] > 1000 and picture.std() > 5
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("text", [None, "", '{"iteration": 6, "lr": 0.1, "total_loss": 2.0}'])
def test_without_curves_nothing_is_drawn(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_text(text, encoding="utf-8")
    write_curves(tmp_path)
    assert not (tmp_path / CURVES).exists()


def test_only_a_full_disk_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(curves, "_draw", fail)
    (tmp_path / "metrics.json").write_text("\n".join(_lines(19, 60, 1.0)), encoding="utf-8")
    error: Exception = ValueError("no such font")
    with caplog.at_level(logging.WARNING, curves.__name__):
        write_curves(tmp_path)
    assert CURVES in caplog.text and "no such font" in caplog.text
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(saving.SaveError, match=r"curves\.png.*No space left"):
        write_curves(tmp_path)
    assert not list(tmp_path.glob(f"{CURVES}*"))
