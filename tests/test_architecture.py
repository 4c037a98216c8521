"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mask_rcnn_plus"

# Room -> the rooms it may import. The rooms themselves and `errors` are open to all.
ALLOWED = {
    "errors": set(),
    "compat": set(),
    "config": {"config_augmentation", "config_file", "config_training", "config_values"},
    "config_augmentation": set(),
    "config_training": set(),
    "config_file": set(),
    "config_rules": set(),
    "config_values": {"config_rules"},
    "device": set(),
    "ops": set(),
    "modeling": {"ops"},
    "data": set(),
    "evaluation": {"modeling", "ops"},
    "engine": {"compat", "config", "data", "device", "evaluation", "modeling"},
    "prediction": {"config", "data", "engine", "evaluation", "modeling", "ops"},
    "tools": {
        *("compat", "ops", "modeling", "config", "data", "device", "evaluation", "engine"),
        "prediction",
    },
    "__init__": {"compat", "config", "data", "device", "engine", "modeling", "prediction"},
}


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms of the package that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [node.module or ""]
            if node.module == PACKAGE:
                modules = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {m.split(".")[1] for m in modules if m.startswith(f"{PACKAGE}.")}
    return rooms


@pytest.mark.parametrize(
    "path", sorted((ROOT / PACKAGE).rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_rooms_import_only_what_the_table_allows(path: Path) -> None:
    room = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    extra = rooms_imported_by(path) - ALLOWED[room] - {room, "errors"}
    assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"


def test_train_net_imports_the_engine_alone() -> None:
    assert rooms_imported_by(ROOT / "train_net.py") == {"engine"}


def test_no_file_has_grown_into_two_rooms() -> None:
    long = [
        str(path.relative_to(ROOT))
        for path in (ROOT / PACKAGE).rglob("*.py")
        if len(path.read_text().splitlines()) > 300
    ]
    assert not long
