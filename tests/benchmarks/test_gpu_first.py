"""benchmarks/gpu_first.sh, with a stand-in for Python: its parts, summary and exit code."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_first.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def rehearse(folder: Path, python: str) -> tuple[int, dict[str, str]]:
    """The exit code, and the result of each part."""
    stand_in = folder / "python"
    stand_in.write_text(f'#!/usr/bin/env bash\necho "$@"\n{python}\n')
    stand_in.chmod(0o755)
    process = subprocess.run(
        [SCRIPT, folder / "results", "--rehearse"],
        env={**os.environ, "PYTHON": str(stand_in)},
        capture_output=True,
        check=False,
    )
    rows = (folder / "results" / "summary.md").read_text().splitlines()[2:]
    cells = [row.strip("| ").split(" | ") for row in rows]
    return process.returncode, {name: result for name, result, _ in cells}


def test_all_parts_run_and_say_what_needs_a_gpu(tmp_path: Path) -> None:
    code, results = rehearse(tmp_path, "exit 0")
    results.pop("build", None)
    assert code == 0
    passed = {name for name, result in results.items() if result == "passed"}
    assert passed == {"doctor", "gpu_tests", "roi_align", "inference", "training"}
    skipped = {name for name, result in results.items() if result == "skipped: no GPU"}
    assert skipped == {"nvidia_smi", "memcheck", "racecheck", "synccheck"}
    assert "benchmarks.roi_align" in (tmp_path / "results" / "roi_align.txt").read_text()


def test_a_failed_part_does_not_stop_the_others(tmp_path: Path) -> None:
    code, results = rehearse(tmp_path, '[[ "$*" != *benchmarks.roi_align* ]]')
    assert code == 1
    assert results["roi_align"] == "failed: exit code 1"
    assert results["inference"] == results["training"] == "passed"
