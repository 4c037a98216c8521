"""Damaged files that a user may get from others: each is one line, never a traceback.

Each reader gets files with random changes, for 5 seconds or for MRP_FUZZ_SECONDS.
"""

import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_tools.cli import main
from tests.tools.report.conftest import MakeRun, make_run  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("MRP_FUZZ_SECONDS", "5"))
# Values that make a careless reader fail.
VALUES = [
    *(None, True, False, 0, -1, 1, 2.5, 1e308, -1e-308, 10**400, 2**63, float("nan"), float("inf")),
    *(
        "",
        " ",
        "1",
        "nan",
        "a\0b",
        "\x1b[31m",
        "\ud800",
        "../../x",
        "/",
        ".",
        "x" * 300,
        "\u202eab",
    ),
    *([], {}, [[]], [None], [1, "a"], [[1, 2], [3]], {"": 0}, {"id": {}}, [[1e308] * 6]),
]
WORDS = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"-1", b"1e999", b"nan", b"9" * 400, b"\n", b"\r"),
    *(b":", b"- ", b"[", b"{", b"}", b'"', b"<", b"/>", b"&a ", b"*a", b"!!python/name:os.system"),
    *(b"&#0;", b"<!DOCTYPE x>", b",", b"\t", b"%", b"../", b"\x1b[2J", b"~", b"null", b"true"),
]


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cuts, repeats, replaces or inserts something at up to three places."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice([0, 1, 1, 4, 40, 400]))
        part = draw.choice(
            [
                b"",
                draw.choice(WORDS),
                draw.randbytes(3),
                content[start:end] * 2,
                content[start:end][::-1],
            ]
        )
        content = content[:start] + part + content[end:]
    return content[: draw.randrange(len(content) + 1)] if draw.random() < 0.1 else content


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def change_tree(tree: Any, draw: random.Random) -> Any:
    """Replaces, removes, renames, wraps or repeats up to three values of nested dicts and lists."""
    tree = deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        found = list(places(tree))
        if not found:
            return draw.choice(VALUES)
        container, key = draw.choice(found)
        how = draw.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1:
            container[key] = draw.choice([[container[key]], {"id": container[key]}])
        elif how == 2:
            container[key] = deepcopy(draw.choice(found)[0])
        elif how == 3 and isinstance(container, dict):
            container[draw.choice(["", "id", "\ud800", "x" * 300])] = container.pop(key)
        else:
            container[key] = deepcopy(draw.choice(VALUES))
    return tree


def change_file(path: Path, draw: random.Random) -> None:
    """Changes a json file as a tree in two of three cases, any other file as bytes."""
    content = path.read_bytes()
    try:
        tree = json.loads(content) if draw.random() < 2 / 3 else None
    except ValueError:  # an image, or json lines
        tree = None
    changed = json.dumps(change_tree(tree, draw)).encode() if tree else change_bytes(content, draw)
    path.write_bytes(changed)


def fuzz(folder: Path, draw: random.Random, read: Callable[[Path], object]) -> None:
    """Calls ``read`` with copies of a folder in which one file is changed; collects tracebacks."""
    failures: dict[str, str] = {}
    work = folder.with_name("changed")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    end, rounds = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        file = draw.choice(files)
        change_file(work / file, draw)
        rounds += 1
        try:
            read(work)
        except UserError as error:
            assert "\n" not in str(error)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{file}: {(work / file).read_bytes()[:2000]!r}\n{traceback.format_exc()}"
            failures.setdefault(f"{type(error).__name__} {last.filename}:{last.lineno}", text)
    assert rounds > 0
    assert not failures, f"{len(failures)} of {rounds}:\n" + "\n".join(failures.values())


def command(*arguments: str) -> Callable[[Path], object]:
    """Runs a command on the changed folder, which replaces {} in its arguments."""

    def read(folder: Path) -> None:
        out = folder.with_name("out")
        shutil.rmtree(out, ignore_errors=True)
        code = main([text.format(folder, out=out) for text in arguments])
        assert code in (0, 1, 2), code

    return read


def draw_images(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def labelme(folder: Path) -> None:
    draw_images(folder, "a.png", "b.png")
    kinds = {"polygon": [[2, 3], [12, 3], [12, 8]], "rectangle": [[5, 5], [9, 9]]}
    kinds |= {"circle": [[20, 15], [20, 19]], "line": [[1, 1], [9, 9]]}
    for name in "ab":
        shapes = [
            {"label": "cat", "points": points, "shape_type": kind, "group_id": None}
            for kind, points in kinds.items()
        ]
        size = {"imageHeight": 30, "imageWidth": 40}
        dump(folder / f"{name}.json", {"shapes": shapes, "imagePath": f"{name}.png", **size})


def via(folder: Path) -> None:
    draw_images(folder, "a.png")
    size = (folder / "a.png").stat().st_size
    shapes = [
        {"name": "polygon", "all_points_x": [2, 12, 12, 2], "all_points_y": [3, 3, 8, 8]},
        {"name": "circle", "cx": 30, "cy": 10, "r": 6},
        {"name": "ellipse", "cx": 30, "cy": 20, "rx": 8, "ry": 4, "theta": 0.5},
        {"name": "rect", "x": 1, "y": 12, "width": 10, "height": 8},
    ]
    regions = [{"shape_attributes": s, "region_attributes": {"kind": "cat"}} for s in shapes]
    entry = {"filename": "a.png", "size": size, "regions": regions, "file_attributes": {}}
    dump(folder / "via.json", {"_via_img_metadata": {f"a.png{size}": entry}, "_via_settings": {}})


def via_csv(folder: Path) -> None:
    draw_images(folder, "a.png")
    (folder / "via.csv").write_text(
        "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
        "region_attributes\n"
        'a.png,9,"{}",1,0,"{""name"":""rect"",""x"":1,""y"":2,""width"":9,""height"":5}",'
        '"{""kind"":""cat""}"\n'
    )


def voc(folder: Path) -> None:
    draw_images(folder, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    for kind, value in (("SegmentationObject", 1), ("SegmentationClass", 8)):
        for name in "ab":
            pixels = np.zeros((30, 40), np.uint8)
            pixels[5:15, 5:20] = value
            image = Image.fromarray(pixels, "P")
            image.putpalette([v for i in range(256) for v in (i, 255 - i, 0)])
            (folder / kind).mkdir(exist_ok=True)
            image.save(folder / kind / f"{name}.png")
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(1, 10)))
    for split, names in (("train", "a\n"), ("val", "b\n")):
        path = folder / "ImageSets/Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(names)


def yolo(folder: Path) -> None:
    draw_images(folder, "images/train/a.png", "images/val/b.png")
    for name in ("train/a", "val/b"):
        path = folder / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0 0.05 0.1 0.3 0.1 0.3 0.3 0.05 0.3\n1 0.5 0.5 0.2 0.2\n")
    (folder / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
    )


def masks(folder: Path) -> None:
    draw_images(folder, "images/a.png", "images/b.png")
    for name in "ab":
        pixels = np.zeros((30, 40), np.uint8)
        pixels[5:15, 5:20] = 255
        path = folder / "masks" / name / "cat" / "1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)


def coco(folder: Path) -> None:
    """A data set with polygons, run lengths and keypoints, as FiftyOne exports it."""
    draw_images(folder, "data/a.png", "data/b.png")
    dump(folder / "labels.json", coco_json())


def coco_json() -> dict[str, Any]:
    shared = {"category_id": 1, "iscrowd": 0, "area": 100, "bbox": [5, 5, 10, 10]}
    polygon = {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]], "keypoints": [6, 6, 2, 0, 0, 0]}
    lengths = {"segmentation": {"size": [30, 40], "counts": [155, 10, 1035]}, "iscrowd": 1}
    return {
        "images": [
            {"id": i, "file_name": f"{name}.png", "height": 30, "width": 40}
            for i, name in enumerate("ab", 1)
        ],
        "categories": [
            {"id": 1, "name": "cat", "keypoints": ["left", "right"], "skeleton": [[1, 2]]}
        ],
        "annotations": [
            {**shared, "id": 1, "image_id": 1, "num_keypoints": 1, **polygon},
            {**shared, "id": 2, "image_id": 2, **lengths},
        ],
    }


def cvat(folder: Path) -> None:
    draw_images(folder, "images/a.png")
    label = 'label="cat" source="manual" occluded="0"'
    shapes = (
        f'<polygon {label} points="4.0,5.0;20.0,5.0;20,25"/>'
        f'<box {label} xtl="4.0" ytl="5.0" xbr="20.0" ybr="25.0" rotation="30"/>'
        f'<ellipse {label} cx="20" cy="15" rx="5" ry="4"/>'
        f'<mask {label} rle="3, 4, 9" left="2" top="2" width="4" height="4"/>'
        f'<points {label} points="4.0,5.0"/>'
    )
    (folder / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><job>'
        "<labels><label><name>cat</name></label></labels></job></meta>"
        f'<image id="0" name="a.png" width="40" height="30">{shapes}</image></annotations>'
    )


def label_studio(folder: Path) -> None:
    draw_images(folder, "a.png")
    shapes = {
        "rectanglelabels": {"x": 10, "y": 20, "width": 40, "height": 60, "rotation": 15},
        "ellipselabels": {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20},
        "polygonlabels": {"points": [[10, 10], [60, 10], [60, 60]]},
        "brushlabels": {"format": "rle", "rle": [0, 0, 18, 192, 57, 57, 255, 0, 128]},
    }
    results = [
        {
            "type": kind,
            "original_width": 40,
            "original_height": 30,
            "value": {kind: ["cat"], **value},
        }
        for kind, value in shapes.items()
    ]
    annotations = [{"id": 1, "result": results, "was_cancelled": False}]
    task = {"id": 1, "data": {"image": "/data/upload/1/a.png"}, "annotations": annotations}
    dump(folder / "project.json", [task])


LABELS = {
    "coco": coco,
    "cvat": cvat,
    "label-studio": label_studio,
    "labelme": labelme,
    "via": via,
    "via csv": via_csv,
    "voc": voc,
    "yolo": yolo,
    "masks": masks,
}


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """A generator that repeats its draws for each test."""
    return random.Random(request.node.name)


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str, tmp_path: Path, draw: random.Random) -> None:
    source = tmp_path / "source"
    LABELS[kind](source)
    convert = command("convert", kind.split()[0], "{}", "--output", "{out}", "--val", "0")
    convert(source)
    assert list((tmp_path / "out").glob("*.json"))
    fuzz(source, draw, convert)


@pytest.mark.parametrize("option", ["check", "repair"])
def test_coco_json(option: str, tmp_path: Path, draw: random.Random) -> None:
    source = tmp_path / "source"
    draw_images(source, "images/a.png", "images/b.png")
    dump(source / "train.json", coco_json())
    files = ("{}/train.json", "--image-root", "{}/images")
    repair = ("--repair", "{out}.json", "--overwrite") if option == "repair" else ()
    fuzz(source, draw, command("check-data", *files, *repair))


def test_config(tmp_path: Path, draw: random.Random) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(Path(__file__).parents[1] / "configs/small_data.yaml", source / "a.yaml")
    (source / "b.yaml").write_text("_BASE_: a.yaml\nINPUT:\n  MIN_SIZE_TRAIN: (64, 96)\n")
    fuzz(source, draw, lambda folder: load_config(folder / "b.yaml"))


def test_run_folder(make_run: MakeRun, tmp_path: Path, draw: random.Random) -> None:  # noqa: F811
    run = make_run(
        "run",
        [(1, 1, [5.0, 5.0, 20.0, 20.0], 0.9), (2, 2, [9.0, 9.0, 30.0, 30.0], 0.4)],
        objects=[(1, 1, [5.0, 5.0, 20.0, 20.0]), (2, 2, [10.0, 10.0, 30.0, 30.0])],
    )
    rows = [{"iteration": i, "total_loss": 2.0 / (i + 1), "lr": 0.1} for i in range(0, 60, 20)]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    results = run / "inference/mine_val"
    dump(results / "metrics.json", {"bbox": {"AP": 30.0, "AP-one": 1.0}, "speed": {"total": 0.1}})
    (results / "summary.csv").write_text(
        "task,metric,iou,area,max_dets,value\nbbox,AP,0.50:0.95,all,100,30.0\n"
    )
    (run / "config.yaml").write_text("TEST:\n  DETECTIONS_PER_IMAGE: 100\n")
    fuzz(run, draw, command("report", "{}", "--output", "{out}.html"))
    assert not list(tmp_path.parent.glob("*ESC*"))


def test_checkpoint_extras(
    trained: Path, tmp_path: Path, draw: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.load(trained / "model_final.pth", weights_only=False)
    extras = {key: value for key, value in whole.items() if key != "model"}
    source = tmp_path / "source"
    draw_images(source, "photo.png")

    def read(folder: Path) -> None:
        changed = change_tree(extras, draw)
        if isinstance(changed, dict):
            changed["model"] = whole["model"]
        torch.save(changed, tmp_path / "model.pth")
        command(
            "predict",
            "--weights",
            str(tmp_path / "model.pth"),
            str(source / "photo.png"),
            "--output",
            "{out}",
        )(folder)

    fuzz(source, draw, read)


def test_checkpoint_bytes(trained: Path, tmp_path: Path, draw: random.Random) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(trained / "model_final.pth", source)
    draw_images(tmp_path, "photo.png")
    photo = str(tmp_path / "photo.png")
    fuzz(
        source,
        draw,
        command("predict", "--weights", "{}/model_final.pth", photo, "--output", "{out}"),
    )
