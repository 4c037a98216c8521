"""The screen: a progress bar on a terminal, plain lines in a pipe."""

import re
from pathlib import Path

import pytest

from mask_rcnn_plus.engine import console, main


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-file", str(tiny_config), "DATASETS.TEST", "()"]
    assert main(command) == 0
    piped = capsys.readouterr()
    assert "Training:" not in piped.err
    assert re.search(r"iter: 1 .*total_loss", piped.out)

    monkeypatch.setattr(console, "_is_terminal", lambda: True)
    assert main(command) == 0
    terminal = capsys.readouterr()
    assert re.search(r"Training: 100%.* 2/2 ", terminal.err)
    assert "loss=" in terminal.err
    assert "total_loss" not in terminal.out


def test_a_second_run_in_one_process_logs_each_line_once(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-file", str(tiny_config), "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    for run in ("first", "second"):
        capsys.readouterr()
        assert main([*command, "OUTPUT_DIR", str(tmp_path / run)]) == 0
    assert capsys.readouterr().out.count("Starting training from iteration") == 1
    assert (tmp_path / "first/log.txt").read_text().count("Starting training") == 1
