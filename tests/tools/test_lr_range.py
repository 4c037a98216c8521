"""mask-rcnn-plus lr-range: suggestions, outputs and errors."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.lr_range import range_test
from mask_rcnn_tools.lr_range.command import CSV, PLOT, main
from mask_rcnn_tools.lr_range.range_test import Curve

RATES = list(np.geomspace(1e-6, 1.0, 120))


def falling_at(rate: float, noise: float) -> Curve:
    """A loss that falls from 3 to 1 around a rate, and rises above 0.1."""
    draws = np.random.default_rng(0).normal(0, noise, len(RATES))
    losses = [
        2 - math.tanh(2 * math.log10(lr / rate)) + max(0.0, 3 * math.log10(lr / 0.1))
        for lr in RATES
    ]
    return Curve(RATES, [float(loss + draw) for loss, draw in zip(losses, draws, strict=True)])


@pytest.mark.parametrize("rate", [1e-4, 3e-3])
def test_suggests_the_rate_where_the_loss_falls_most_steeply(rate: float) -> None:
    for noise in (0.0, 0.2):
        suggested = falling_at(rate, noise).suggestion()
        assert suggested is not None
        assert abs(math.log10(suggested / rate)) < 0.5


def test_noise_leads_to_no_suggestion() -> None:
    for seed in range(20):
        draws = np.random.default_rng(seed).normal(2.0, 0.4, len(RATES))
        assert Curve(RATES, draws.tolist()).suggestion() is None


def test_only_the_plot_and_the_table_are_written(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "range"
    command = ["--config-file", str(tiny_config), "--start", "1e-5", "--end", "1e6"]
    command += ["--iterations", "30", "--output", str(output)]
    code = main(command)
    assert {path.name for path in output.iterdir()} == {PLOT, CSV}
    rows = list(csv.reader((output / CSV).open()))
    rates = [float(row[0]) for row in rows[1:]]
    # The rate rises by the same factor, and the test ends when the loss diverges.
    factor = 1e11 ** (1 / 29)
    assert 10 <= len(rates) < 30
    assert rates == pytest.approx([1e-5 * factor**step for step in range(len(rates))])
    printed = capsys.readouterr().out
    assert ("SOLVER.BASE_LR" in printed) == (code == 0)
    assert not (tmp_path / "output").exists()
    with pytest.raises(UsageError, match=f"{CSV} exists|{PLOT} exists"):
        main(command)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--start", "1", "--end", "0.1"], "--start 1 must be below --end 0.1"),
        (["--start", "nan"], "must be a number above 0, not 'nan'"),
        (["--iterations", "3"], "--iterations must be at least 10"),
        ([], "required: --config-file"),
    ],
)
def test_wrong_arguments_are_refused(options: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        main([*(["--config-file", __file__] if options else []), *options])
    assert expected in str(error.value)


def test_the_suggestion_is_scaled_to_the_reference_batch_size(
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(range_test, "range_test", lambda *_, **__: falling_at(1e-3, 0.0))
    suggestions = []
    for number, reference in enumerate((0, 8)):
        keys = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_IMS_PER_BATCH", str(reference)]
        command = ["--config-file", str(tiny_config), "--output", str(tmp_path / str(number))]
        assert main([*command, *keys]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        suggestions.append(float(line.split()[1]))
    # The run will divide it by 4.
    assert suggestions[1] == pytest.approx(4 * suggestions[0], rel=0.06)
