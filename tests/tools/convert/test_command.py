"""The command mask-rcnn-plus convert, and training on its result."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mask_rcnn_plus.engine import main as train
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.convert.command import FORMATS
from tests.conftest import TINY


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four images that are labelled with labelme."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        pixels = np.full((64, 64, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        shapes = [
            {"label": "box", "points": [[8, 8], [40, 30]], "shape_type": "rectangle"},
            {"label": "disc", "points": [[45, 45], [45, 55]], "shape_type": "circle"},
            {"label": "disc", "points": [[45, 45]], "shape_type": "point"},
        ]
        content: dict[str, Any] = {"imagePath": f"{number}.png", "shapes": shapes}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def test_training_on_converted_labels(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "datasets" / "things"
    assert main(["convert", "labelme", str(photos), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"note +4 x  .* point ", out)
    assert "things_train: 3 images, 6 annotations, 2 classes" in out  # from the data check
    assert out.count("no errors") == 2
    assert "DATASETS.TRAIN \"('things_train',)\" DATASETS.TEST \"('things_val',)\"" in out
    config = tmp_path / "tiny.yaml"
    names = {"TRAIN": ["things_train"], "TEST": ["things_val"]}
    solver = {**TINY["SOLVER"], "MAX_ITER": 1}
    folders = {"DATASETS": names, "SOLVER": solver, "OUTPUT_DIR": str(tmp_path / "output")}
    config.write_text(yaml.safe_dump({**TINY, **folders}))
    assert train(["--config-file", str(config)]) == 0
    metrics = json.loads((tmp_path / "output/inference/things_val/metrics.json").read_text())
    assert "segm" in str(metrics)


def test_links_that_lead_nowhere_and_pipes_are_skipped_and_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "gone.json").symlink_to("nowhere")  # as git-annex leaves it
    (photos / "circle.json").symlink_to("circle.json")
    (photos / "long.json").symlink_to("x" * 300)
    os.mkfifo(photos / "pipe.json")
    (photos / ".hidden.json").symlink_to("nowhere")
    arguments = ["labelme", str(photos), "--output", str(tmp_path / "out"), "--split", "train"]
    assert main(["convert", *arguments]) == 1
    out = capsys.readouterr().out
    assert re.search(r"skipped +4 x  .* links that lead nowhere, pipes", out) and "gone.json" in out
    assert "out_train: 4 images" in out


@pytest.mark.parametrize("target", ["/nowhere", "images"])
def test_an_image_folder_that_leads_nowhere_is_named(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "seg"
    source.mkdir()
    (source / "data.yaml").write_text("names: [cat]")
    (source / "images").symlink_to(target)
    assert main(["convert", "yolo", str(source), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"{source / 'images'} is a link that leads nowhere ({target})" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("voc", "masks")])
def test_a_pipe_as_source_is_named_and_not_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "labels.json")
    arguments = [name, str(tmp_path / "labels.json"), "--output", str(tmp_path / "out")]
    assert main(["convert", *arguments]) == 2
    assert "labels.json' is a pipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("voc", "masks", "yolo")])
def test_an_unreadable_file_as_source_is_the_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_text("{")
    arguments = [name, str(tmp_path / "labels.json"), "--output", str(tmp_path / "out")]
    assert main(["convert", *arguments]) == 2
    assert "labels.json' is not valid" in capsys.readouterr().err


def test_a_shell_can_run_the_next_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my data" / "things"
    assert main(["convert", "labelme", str(photos), "--output", str(output)]) == 0
    tokens = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert tokens[0] == f"DETECTRON2_DATASETS={tmp_path / 'my data'}"
    assert Path(tokens[tokens.index("train_net.py") - 1]).name.startswith(("run", "python"))
    assert tokens[-4:] == [
        "DATASETS.TRAIN",
        "('things_train',)",
        "DATASETS.TEST",
        "('things_val',)",
    ]


def test_the_last_command_trains_on_all_that_is_converted(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    datasets = tmp_path / "datasets"
    for output, *options in (
        ("things",),
        ("things", "--split", "train2"),
        ("things", "--split", "dogs", "--classes", "disc"),
        ("more", "--split", "all"),
        ("others", "--split", "all", "--classes", "disc", "box"),
    ):
        arguments = ["labelme", str(photos), "--output", str(datasets / output), *options]
        assert main(["convert", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        if output == "things":
            assert "more_all" not in lines[-1]
        if output == "more":
            here, everything = (shlex.split(line) for line in (lines[-3], lines[-1]))
    assert here[:3] == ["uv", "run", "train_net.py"]
    assert here[-4:] == ["DATASETS.TRAIN", "('more_all',)", "DATASETS.TEST", "()"]
    assert everything[-3] == "('more_all', 'things_train', 'things_train2')"
    assert everything[-1] == "('things_val',)"
    assert (
        main(["convert", *arguments[:2], "--output", str(datasets / "things"), "--overwrite"]) == 0
    )
    assert "dogs.json has other classes" in capsys.readouterr().out


def test_no_training_is_suggested_without_objects_to_train_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("images/val", "labels/val"):
        (tmp_path / "seg" / folder).mkdir(parents=True)
    (photos / "0.png").rename(tmp_path / "seg/images/val/0.png")
    (tmp_path / "seg/labels/val/0.txt").write_text("0 0.1 0.1 0.6 0.1 0.6 0.5\n")
    (tmp_path / "seg/data.yaml").write_text("{names: [disc], val: images/val}")
    output = ["--output", str(tmp_path / "datasets" / "seg")]
    assert main(["convert", "yolo", str(tmp_path / "seg"), *output]) == 0
    out = capsys.readouterr().out
    assert "--val 0.2" in out
    assert "datasets/seg;" in out.splitlines()[-1] and "train_net.py" not in out


def test_the_exit_code_is_1_if_something_is_skipped(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "3.json").write_text("{")
    arguments = ["--output", str(tmp_path / "datasets" / "things"), "--split", "all"]
    assert main(["convert", "labelme", str(photos), *arguments]) == 1
    out = capsys.readouterr().out
    assert "skipped       1 x  files cannot be read" in out and "3.json" in out
    assert "things_all: 3 images, 6 annotations" in out


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["convert", name, "--help"])
    out = capsys.readouterr().out
    assert f"mask-rcnn-plus convert {name} " in out.split("example:")[1]
    assert "exit code: 0" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: FORMAT"),
        (["labelm", "{photos}"], "'labelm'; did you mean 'labelme'?"),
        (["kitti", "{photos}"], "coco, cvat, label-studio, labelme, via, voc, yolo, masks"),
        (["label_studio", "{photos}"], "did you mean 'label-studio'?"),
        (["coco", "{photos}", "--output", "{out}"], "looked for a COCO json"),
        (["coco", "{photos}/0.json", "--output", "{out}"], "'images' is missing"),
        (["cvat", "{photos}", "--output", "{out}"], "annotations.xml; found 0.json"),
        (["label-studio", "{photos}", "--output", "{out}"], "found 0.json, 1.json"),
        (["coco", "{photos}.zip", "--output", "{out}"], "unpack"),
        (["labelme", "{photos}"], "required: --output"),
        (["labelme", "nowhere", "--output", "{out}"], "'nowhere'"),
        (["masks", "{photos}/0.json", "--output", "{out}"], "is not a folder"),
        (["labelme", "{photos}", "--output", "{photos}/data"], "inside SOURCE"),
        (["labelme", "{photos}", "--output", "{photos}/0.json"], "is a file"),
        (["labelme", "{photos}", "--output", "{out}", "--val", "2"], "--val"),
        (["labelme", "{photos}", "--output", "{out}", "--split", "a/b"], "--split"),
        (["labelme", "{photos}", "--output", "{out}", "--val", "0", "--split", "a"], "exclude"),
        (["labelme", "{photos}", "--output", "{out}", "--copy", "--link"], "not allowed with"),
        (["labelme", "{photos}", "--output", "{out}", "--images", "nowhere"], "--images"),
        (["labelme", "{photos}", "--output", "{out}", "--class-name", "a"], "unrecognized"),
        (["voc", "{photos}", "--output", "{out}"], "no folder 'JPEGImages'"),
        (["yolo", "{photos}", "--output", "{out}"], "--classes NAME"),
        (["masks", "{photos}", "--output", "{out}"], "NAME/masks/"),
        (["via", "{photos}", "--output", "{out}"], "no images to convert"),
    ],
)
def test_an_invalid_argument_gives_one_line(
    arguments: list[str],
    expected: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.make_archive(str(photos), "zip", photos)
    arguments = [text.format(photos=photos, out=tmp_path / "out") for text in arguments]
    assert main(["convert", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert expected in captured.err
    assert not (tmp_path / "out").exists()
