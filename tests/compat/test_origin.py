"""Recognising the installed detectron2, and warning about a changed one."""

import json
import logging
import shutil
from pathlib import Path

import detectron2
import pytest

from mask_rcnn_plus.compat import origin
from mask_rcnn_plus.compat.origin import Origin, check_detectron2, origin_of

TABLE = Path(origin.__file__).with_name("detectron2_0_6.sha256")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed detectron2's Python files, in an empty folder."""
    source = Path(detectron2.__file__).parent
    if origin_of(source).kind != "upstream 0.6":
        pytest.skip("the installed detectron2 is not v0.6")
    for path in source.rglob("*.py"):
        copy = tmp_path / "detectron2" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / "detectron2"


def packed(package: Path, version: str = "0.6", direct_url: dict | None = None) -> None:
    folder = package.parent / f"pb1_detectron2-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: pb1-detectron2\nVersion: {version}\n"
    )
    if direct_url is not None:
        (folder / "direct_url.json").write_text(json.dumps(direct_url))


def test_the_table_has_the_digest() -> None:
    import hashlib

    assert hashlib.sha256(TABLE.read_bytes()).hexdigest() == origin.UPSTREAM_0_6
    assert len(TABLE.read_text().splitlines()) == 140


def test_upstreams_files_are_recognised_in_any_package(package: Path) -> None:
    packed(package)
    (package / "projects").mkdir(exist_ok=True)
    (package / "projects" / "extra.py").write_text("x = 1\n")
    assert origin_of(package) == Origin("upstream 0.6", "pb1-detectron2 0.6", ())


def changed(package: Path) -> tuple[str, ...]:
    (package / "engine" / "hooks.py").write_text("import os\n")
    (package / "utils" / "env.py").unlink()
    (package / "more.py").touch()
    return ("engine/hooks.py", "more.py", "utils/env.py")


def test_the_files_of_a_different_redistribution_are_listed(
    package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed(package)
    found = origin_of(package)
    names = changed(package)
    found = origin_of(package)
    assert found == Origin("redistribution", "pb1-detectron2 0.6", names)
    monkeypatch.setattr(origin, "detectron2_origin", lambda: found)
    with caplog.at_level(logging.WARNING):
        check_detectron2()
    (message,) = [r.getMessage() for r in caplog.records if r.name == origin.__name__]
    assert "3 files differ: engine/hooks.py, more.py, utils/env.py" in message


def test_at_most_ten_files_are_listed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = tuple(f"file{number:02}.py" for number in range(12))
    monkeypatch.setattr(
        origin, "detectron2_origin", lambda: Origin("redistribution", "x-detectron2 0.6", names)
    )
    with caplog.at_level(logging.WARNING):
        check_detectron2()
    (message,) = [r.getMessage() for r in caplog.records if r.name == origin.__name__]
    assert "file09.py and 2 more" in message and "file10.py" not in message


@pytest.mark.parametrize(
    "direct_url",
    [
        {"url": "file:///src/detectron2", "dir_info": {"editable": True}},
        {"url": "git+file:///src/detectron2", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}},
    ],
)
def test_a_source_install_may_differ(
    package: Path,
    direct_url: dict,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed(package, direct_url=direct_url)
    names = changed(package)
    found = origin_of(package)
    assert found == Origin("source", "pb1-detectron2 0.6", names)
    monkeypatch.setattr(origin, "detectron2_origin", lambda: found)
    check_detectron2()
    assert not caplog.records


def test_a_checkout_is_a_source_install(package: Path) -> None:
    (package.parent / ".git").mkdir()
    changed(package)
    assert origin_of(package).kind == "source"


def test_another_version_is_not_compared(package: Path) -> None:
    packed(package, version="0.7")
    changed(package)
    assert origin_of(package) == Origin("redistribution", "pb1-detectron2 0.7", ())
