"""Which package may import which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Subpackage -> the subpackages that it may import. Each may import itself and `errors`.
ALLOWED = {
    "errors": set(),
    "compat": set(),
    "device": set(),
    "config": set(),
    "ops": set(),
    "modeling": {"ops"},
    "optimization": {"modeling", "ops"},
    "data": set(),
    "evaluation": {"modeling", "optimization", "ops"},
    "engine": {
        *("compat", "config", "data", "device", "evaluation", "modeling", "ops", "optimization")
    },
    "prediction": {
        *("config", "data", "device", "engine", "evaluation", "modeling", "ops", "optimization")
    },
}
PACKAGES = {
    "mask_rcnn_plus": {"mask_rcnn_plus"},
    "mask_rcnn_tools": {"mask_rcnn_plus", "mask_rcnn_tools"},
    "benchmarks": {"mask_rcnn_plus", "mask_rcnn_tools", "benchmarks"},
}


def imported(path: Path) -> set[tuple[str, ...]]:
    """The dotted names of a file's imports, of our packages and of torch and detectron2."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")) for name in found}


def subpackages(path: Path) -> set[str]:
    """The subpackages of the plugin that a file imports."""
    return {name[1] for name in imported(path) if name[0] == "mask_rcnn_plus" and len(name) > 1}


@pytest.mark.parametrize("name", ALLOWED)
def test_subpackages_import_only_what_the_table_allows(name: str) -> None:
    folder = ROOT / "mask_rcnn_plus" / name
    files = list(folder.rglob("*.py")) or [folder.with_suffix(".py")]
    for path in files:
        assert subpackages(path) <= ALLOWED[name] | {name, "errors"}, path


def test_every_room_is_in_the_table() -> None:
    entries = (ROOT / "mask_rcnn_plus").iterdir()
    python = {e.stem for e in entries if e.suffix == ".py" or any(e.glob("**/*.py"))}
    assert python == {*ALLOWED, "__init__"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        used = {name[0] for name in imported(path)} & PACKAGES.keys()
        assert used <= PACKAGES[package], path


def test_operators_need_torch_but_not_detectron2() -> None:
    for path in (ROOT / "mask_rcnn_plus/ops").glob("*.py"):
        assert "detectron2" not in {name[0] for name in imported(path)}, path


@pytest.mark.slow
def test_the_plugin_trains_and_evaluates_without_the_tools(tiny_config: Path) -> None:
    code = """if True:
        import runpy, sys
        sys.modules["mask_rcnn_tools"] = None  # importing it now fails
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    script = f"import sys; sys.argv = sys.argv[1:]\n{code}"
    command = [sys.executable, "-c", script, str(ROOT / "train_net.py")]
    command += ["--config-file", str(tiny_config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    weights = tiny_config.parent / "output/model_final.pth"
    for options in ([], ["--eval-only", "MODEL.WEIGHTS", str(weights)]):
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "DATA_CHECK" in done.stdout and "not checked" in done.stdout
    assert weights.is_file()
