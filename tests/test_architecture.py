"""Which package may import which."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Subpackage -> the subpackages that it may import. Each may import itself and `errors`.
ALLOWED = {
    "errors": set(),
    "compat": set(),
    "device": {"config"},
    "files": set(),
    "config": set(),
    "ops": set(),
    "modeling": {"config", "ops"},
    "optimization": {"modeling", "ops"},
    "data": {"config"},
    "evaluation": {"files", "modeling", "optimization", "ops"},
    "engine": {
        *("compat", "config", "data", "device", "evaluation", "files", "modeling", "ops"),
        "optimization",
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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")) for name in found}


def subpackages(path: Path) -> set[str]:
    """The subpackages of the plugin that a file imports."""
    return {
        name[1] if len(name) > 1 else "__init__"
        for name in imported(path)
        if name[0] == "mask_rcnn_plus"
    }


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


def test_starting_a_command_needs_no_torch() -> None:
    for name in ("__init__", "cli", "arguments", "machine", "doctor/__init__", "doctor/command"):
        used = {name[0] for name in imported(ROOT / f"mask_rcnn_tools/{name}.py")}
        allowed = {"mask_rcnn_tools", "torch"} if name == "arguments" else {"mask_rcnn_tools"}
        assert used & {"torch", "detectron2", "mask_rcnn_plus", "mask_rcnn_tools"} <= allowed, name


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text file in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    constants = [a.value for a in call.args if isinstance(a, ast.Constant)]
    binary = any(isinstance(c, str) and "b" in c and set(c) <= set("rwxab+") for c in constants)
    owner = ast.unparse(call.func).split(".")[0]
    # Not files: images, file descriptors, metadata of a distribution, and our own functions.
    other = owner in (
        "Image",
        "os",
        "distribution",
        "files",
        "formats",
        "images",
        "read_text",
        "saving",
        "write_text",
    )
    return (
        name in ("open", "read_text", "write_text")
        and not (binary or other)
        and "encoding" not in {keyword.arg for keyword in call.keywords}
    )


def test_text_files_do_not_depend_on_the_locale() -> None:
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and opens_text(node)), (path, node.lineno)


def test_the_package_itself_counts_as_an_import(tmp_path: Path) -> None:
    for text in ("import mask_rcnn_plus", "from mask_rcnn_plus import BatchPredictor"):
        (tmp_path / "room.py").write_text(text)
        assert not subpackages(tmp_path / "room.py") <= {*ALLOWED}, text


@pytest.mark.slow
def test_the_plugin_trains_and_evaluates_without_the_tools(
    tiny_config: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "mask_rcnn_plus", tree / "mask_rcnn_plus")
    shutil.copy(ROOT / "train_net.py", tree)
    # -S: an editable install would find the tools in the clone. Of the environment, only its
    # packages are on the path.
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    command = [sys.executable, "-S", str(tree / "train_net.py"), "--config-file", str(tiny_config)]
    path = os.pathsep.join([str(tree), *packages])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    settings = {"cwd": tree, "env": environment, "capture_output": True, "text": True}
    find = "import importlib.util as i; print(i.find_spec('mask_rcnn_tools'))"
    assert subprocess.run([*command[:2], "-c", find], **settings).stdout == "None\n"
    weights = tiny_config.parent / "output/model_final.pth"
    for options in ([], ["--eval-only", "MODEL.WEIGHTS", str(weights)]):
        done = subprocess.run([*command, *options], **settings)
        assert done.returncode == 0, done.stderr
        assert "DATA_CHECK" in done.stdout and "not checked" in done.stdout
    assert weights.is_file()
