"""The screen: a progress bar on a terminal, plain lines in a pipe."""

import io
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage

from mask_rcnn_plus.engine import console, main

ROOT = Path(__file__).parents[2]


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


def run_with_streams(config: Path, shell: str) -> subprocess.CompletedProcess[str]:
    """train_net.py in a shell, which is given the command as "$@"."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config)]
    command += ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}", "train", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        '"$@" | head -n 1',
        '"$@" > /dev/full',
        '"$@" 2> /dev/full',
        '"$@" >&- 2>&-',
        '"$@" --eval-only MODEL.WEIGHTS "" 2> /dev/full > /dev/full; test $? = 2',
    ],
)
def test_output_that_nobody_reads_does_not_change_a_run(tiny_config: Path, shell: str) -> None:
    done = run_with_streams(tiny_config, shell)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_stream_that_fails_drops_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str = "") -> int:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", None)
    with console.lasting_output():
        print("lost")
        print("lost", file=sys.stderr)
        assert not sys.stderr.isatty()


def test_text_that_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with console.lasting_output():
        print("1 \u732b")
    assert written.getvalue() == b"1 \\u732b\n"


def test_the_bar_ends_with_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_is_terminal", lambda: True)
    bar = console.ProgressBar()
    bar.trainer = types.SimpleNamespace(max_iter=2, start_iter=0, iter=0, storage=EventStorage())
    bar.before_train()
    bar.after_step()
    assert not bar._bar.disable
    bar.trainer.iter = 1
    bar.after_step()
    assert bar._bar.disable  # closed: an evaluation that follows draws its own bar
    bar.after_train()
