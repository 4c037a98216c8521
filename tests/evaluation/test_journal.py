"""A resumed evaluation recovers the intact lines of an interrupted one."""

import os
from pathlib import Path

import pytest
import torch

from mask_rcnn_plus.evaluation import Journal


def write(folder: Path, fingerprint: str, *images: object) -> None:
    journal = Journal(folder, fingerprint)
    for image in images:
        journal.add({"image_id": image, "instances": []})
    journal._file.close()


def test_recovers_only_records_of_the_same_evaluation(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, "two")
    write(tmp_path, "a", 3)  # killed again
    assert Journal(tmp_path, "a").done == {1, "two", 3}
    assert [e["image_id"] for e in Journal(tmp_path, "a").kept] == [1, "two", 3]
    stale = Journal(tmp_path, "b")
    assert stale.done == set() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 42))
def test_a_truncated_line_is_ignored(tmp_path: Path, cut: int) -> None:
    write(tmp_path, "a", 1, 2)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    assert Journal(tmp_path, "a").done == ({1} if cut > 1 else {1, 2})
    write(tmp_path, "a", 3)
    assert Journal(tmp_path, "a").done == ({1, 3} if cut > 1 else {1, 2, 3})


def test_a_corrupt_line_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b'"image_id": 1', b'"image_id": 7'))
    assert Journal(tmp_path, "a").done == {2}


def test_remove_deletes_the_folder(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "a")
    journal.add({"image_id": 1})
    journal.remove()
    assert not (tmp_path / "journal").exists()


def _process(rank: int, folder: Path, outcome: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{outcome}/meet", rank=rank, world_size=2
    )
    journal = Journal(folder, "a")
    kept = sorted(entry["image_id"] for entry in journal.kept)
    (outcome / str(rank)).write_text(f"{sorted(journal.done)} {kept}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_each_image_belongs_to_one_of_several_processes(tmp_path: Path) -> None:
    write(tmp_path / "journal", "a", 4, 5, 6)
    arguments = (tmp_path / "journal", tmp_path)
    torch.multiprocessing.start_processes(_process, arguments, nprocs=2, start_method="fork")
    assert (tmp_path / "0").read_text() == "[4, 5, 6] [4, 5, 6]"
    assert (tmp_path / "1").read_text() == "[4, 5, 6] []"
