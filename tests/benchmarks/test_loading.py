"""python -m benchmarks.loading: its rows and its refusals."""

from functools import partial
from pathlib import Path

import pytest

from benchmarks import loading
from mask_rcnn_tools.arguments import run_command

main = partial(run_command, loading.main)


def test_each_augmentation_has_a_row(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config-file", str(tiny_config), "--images", "2"]
    # The masks are polygons by default; jitter replaces the crop.
    assert main([*command, "INPUT.CROP.ENABLED", "True"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 9
    assert lines[2].startswith("| none |") and lines[2].endswith("| +0.0 |")
    assert lines[3].startswith("| jitter 0.1 to 2, 64 x 64 |")
    assert main(["--config-file", str(tiny_config), "DATASETS.TRAIN", "()"]) == 2
    assert "DATASETS.TRAIN is empty" in capsys.readouterr().err
