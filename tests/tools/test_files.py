"""Output files of the commands: checked before the work, written completely or not at all."""

import errno
import os
from pathlib import Path

import pytest

from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.files import require_new, write_atomically, write_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("ü" * 120 + ".html")
    for content in ("first, longer ü", b"second"):
        write_atomically(path, content)
        expected = content if isinstance(content, bytes) else content.encode()
        assert path.read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_the_permissions_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o600)
    write_atomically(tmp_path / "new", "y")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match=r"page\.html: No space left"):
        write_file(path, "new")
    assert capsys.readouterr().err == ""
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"] and path.read_text() == "old"


def test_a_link_is_replaced_and_a_device_is_written(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "link").symlink_to("other")
    write_atomically(tmp_path / "link", "x")
    assert (tmp_path / "other").read_text() == "mine" and not (tmp_path / "link").is_symlink()
    (tmp_path / "null").symlink_to(os.devnull)
    write_atomically(tmp_path / "null", "x")
    assert (tmp_path / "null").is_symlink()


def test_an_output_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    for name, overwrite in (("old", False), (".", True), ("no/new", True), ("x" * 300, True)):
        with pytest.raises(UsageError, match="--output"):
            require_new(tmp_path / name, overwrite=overwrite)
    require_new(tmp_path / "old", overwrite=True)
    require_new(tmp_path / "new", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
