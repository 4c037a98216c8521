"""All commands read the same images: file endings, and images above Pillow's limit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mask_rcnn_tools.cli import main
from mask_rcnn_tools.convert.labels import images_below
from mask_rcnn_tools.predict import frames as frames_module
from mask_rcnn_tools.predict.frames import Frame, prefetch_batches
from mask_rcnn_tools.predict.sources import Source, find_sources

ENDINGS = ("jpg", "JPG", "jpe", "jfif", "ppm", "pgm", "tga", "webp")


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit of 1,000 pixels for the running test."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    return 1000


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set few_train: one image of 40 x 30 pixels with one object."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("MASK_RCNN_PLUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "few" / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "few" / "images" / "a.png")
    square = [5, 5, 25, 5, 25, 15, 5, 15]
    annotation = {"bbox": [5, 5, 20, 10], "segmentation": [square], "area": 200, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **annotation}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "few" / "train.json").write_text(json.dumps(content))
    return tmp_path / "few"


def test_every_ending_is_found_in_a_folder_by_all_commands(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, ending in enumerate(ENDINGS):
        Image.new("L", (8, 6)).save(folder / f"{number}.{ending}")
    (folder / "notes.txt").write_text("")
    sources, left_out = find_sources([str(folder)], recursive=False, output=tmp_path / "out")
    assert [count for _, count in left_out] == [1]
    assert [Path(source.path).suffix[1:] for source in sources] == list(ENDINGS)
    assert [path.suffix[1:] for path in images_below(folder)] == list(ENDINGS)


def test_check_data_takes_the_limit_from_its_option(
    pets: Path, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # Twice, because results are cached.
    for _ in range(2):
        assert main(["check-data", "few_train"]) == 1
        assert f"{limit:,}" in capsys.readouterr().out
        assert main(["check-data", "few_train", "--max-pixels", "1200"]) == 0
        capsys.readouterr()
        Image.MAX_IMAGE_PIXELS = 500


def test_training_takes_the_limit_from_the_config(
    pets: Path, limit: int, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mask_rcnn_plus.engine import main as train

    run = ["--config-file", str(tiny_config), "DATASETS.TRAIN", "('few_train',)"]
    run += ["DATASETS.TEST", "('few_train',)", "SOLVER.MAX_ITER", "1", "TEST.LOSS_PERIOD", "1"]
    assert train(run) == 2
    assert "INPUT.MAX_PIXELS" in capsys.readouterr().err
    assert train([*run, "INPUT.MAX_PIXELS", "1200"]) == 0


@pytest.mark.parametrize("slices", [[], ["--slice", "32"]])
def test_predict_takes_the_limit_from_its_option(
    trained: Path,
    pets: Path,
    limit: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slices: list[str],
) -> None:
    run = ["predict", "--weights", str(trained / "model_final.pth"), "--device", "cpu", *slices]
    run += [str(pets / "images" / "a.png"), "--output", str(tmp_path / "drawn"), "--overwrite"]
    assert main(run) == 1
    message = capsys.readouterr().err
    assert "a.png has 1,200 pixels" in message and "--max-pixels" in message
    assert main([*run, "--max-pixels", "1200"]) == 0
    assert main([*run, "--set", "INPUT.MAX_PIXELS", "1200"]) == 2
    assert "--max-pixels" in capsys.readouterr().err


def test_convert_takes_the_limit_from_its_option(
    pets: Path, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pets / "train.json").unlink()
    (pets / "labels").mkdir()
    (pets / "labels" / "a.txt").write_text("0 0.1 0.1 0.6 0.1 0.6 0.6 0.1 0.6\n")
    (pets / "data.yaml").write_text("names: [cat]\n")
    run = ["convert", "yolo", str(pets), "--output", str(tmp_path / "new"), "--split", "train"]
    assert main(run) != 0
    message = "".join(capsys.readouterr())
    assert "a.png has 1,200 pixels" in message and "--max-pixels" in message
    assert main([*run, "--max-pixels", "1200", "--overwrite"]) == 0


def test_large_images_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_module, "_LARGE", 300)
    read: list[int] = []

    def frames() -> Any:
        for number, side in enumerate((2, 2, 20, 20, 2)):
            read.append(number)
            image = np.zeros((side, side, 3), np.uint8)
            yield Frame(Source("image", str(number), str(number)), None, image)

    batches = []
    for batch in prefetch_batches(frames(), 4):
        batches.append([int(frame.source.path) for frame in batch])
        if batch[-1].image.size > 300:
            assert read[-1] == batches[-1][-1]  # the next one is not read yet
    assert batches == [[0, 1, 2], [3], [4]]
