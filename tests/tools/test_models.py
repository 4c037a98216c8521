"""mask-rcnn-plus models, and predict with a model of the zoo."""

import csv
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2 import modeling
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from mask_rcnn_plus import BatchPredictor, UserError, load_config
from mask_rcnn_plus.engine import downloads
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.models.zoo import PUBLISHED, cached_file, checkpoints, zoo_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)
    monkeypatch.chdir(tmp_path)
    PathManager.register_handler(downloads.Downloads())
    cv2.imwrite("photo.jpg", np.random.default_rng(0).integers(0, 255, (64, 80, 3)))
    return tmp_path / "cache"


def test_models_lists_each_with_its_ap_and_size(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cached_file(zoo_weights("mask_rcnn_R_50_FPN_3x"))
    assert file == cache / (
        "detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/"
        "model_final_f10217.pkl"
    )
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(2_000_000))
    assert main(["models"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert len(rows) == 1 + len(PUBLISHED)
    assert rows["mask_rcnn_R_50_FPN_3x"] == ["41.0", "37.2", "2", "yes"]
    assert rows["keypoint_rcnn_R_50_FPN_3x"] == ["55.4", "65.5", "237"]


def test_each_listed_model_has_a_config_and_a_checkpoint() -> None:
    names = {name.rpartition("/")[2] for name in PUBLISHED}
    assert len(names) == len(PUBLISHED)
    assert names <= {path.stem for path in (ROOT / "configs/coco").glob("*.yaml")}
    assert PUBLISHED.keys() <= checkpoints().keys()


def test_names_of_models_are_accepted_in_several_forms() -> None:
    full = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
    expected = f"detectron2://{full}/137260431/model_final_a54504.pkl"
    for name in (full, f"{full}.yaml", "mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_1x.yaml"):
        assert zoo_weights(name) == expected
    assert zoo_weights("mask_rcnn_R_50_FPN") == zoo_weights("mask_rcnn_R_50_FPN_3x")
    assert "PascalVOC" in zoo_weights("PascalVOC-Detection/faster_rcnn_R_50_C4")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "model_final_f10217.pkl'"),
        (["--model", "keypoint_rcnn_R_50_FPN_3x"], "model_final_a6e10b.pkl'"),
        (["--model", "mask_rcnn_R_50_FPN", "--weights", __file__], "--model"),
        (["--model", "keypoint_rcnn_R50_FPN_3x"], "'keypoint_rcnn_R_50_FPN_3x'?"),
        (["--model", "retinanet_R_50_FPN_3x"], "retinanet_R_50_FPN_3x.yaml not available"),
    ],
)
def test_without_a_network_predict_says_what_to_do(
    cache: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments, "photo.jpg"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert ("save this file as" in err) == expected.endswith(".pkl'")


def save_weights(config: Path, file: Path, class_id: int) -> None:
    """Weights of a model that finds this class everywhere, as a file of the zoo."""
    cfg = load_config(config)
    cfg.MODEL.DEVICE = "cpu"
    arrays = {name: v.numpy() * 0 for name, v in modeling.build_model(cfg).state_dict().items()}
    for name in arrays:
        if name.endswith("cls_score.bias"):
            arrays[name][class_id] = 5
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "class_name"),
    [
        ("", "dog"),
        ("faster_rcnn_R_50_FPN_1x", "toothbrush"),
        ("mask_rcnn_R_50_C4_3x", "person"),
        ("cascade_mask_rcnn_R_50_FPN_3x", "bicycle"),
        ("keypoint_rcnn_R_50_FPN_1x", "person"),
    ],
)
def test_predict_names_cocos_classes(
    cache: Path, model: str, class_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_promised", lambda _: ("", ()))
    name = model or "mask_rcnn_R_50_FPN_3x"
    file = cached_file(zoo_weights(name))
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    save_weights(ROOT / f"configs/coco/{name}.yaml", file, names.index(class_name))
    small = ["--set", "INPUT.MIN_SIZE_TEST", "64", "--csv", "--max-detections", "5"]
    chosen = ["--model", model] if model else []
    assert main(["predict", *chosen, *small, "--device", "cpu", "photo.jpg"]) == 0
    with Path("output/predictions/objects.csv").open() as table:
        assert {row["class"] for row in csv.DictReader(table)} == {class_name}
    predictor = BatchPredictor.from_checkpoint(file, opts=["MODEL.DEVICE", "cpu"])
    assert predictor.class_names == (["person"] if "keypoint" in name else names)


@pytest.mark.slow
def test_the_sizes_are_those_of_the_parameters() -> None:
    for name, (*_, megabytes) in PUBLISHED.items():
        cfg = load_config(ROOT / f"configs/coco/{name.rpartition('/')[2]}.yaml")
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            state = modeling.build_model(cfg).state_dict()
        assert round(sum(value.nbytes for value in state.values()) / 1e6) == megabytes, name


def test_a_model_without_a_config_here_is_refused_in_python(cache: Path) -> None:
    weights = zoo_weights("retinanet_R_50_FPN_3x")
    with pytest.raises(UserError, match=r"retinanet_R_50_FPN_3x\.yaml not available"):
        BatchPredictor.from_checkpoint(weights)


def test_the_page_shows_the_list(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    page = (ROOT / "docs/models.md").read_text()
    assert capsys.readouterr().out.strip() in re.sub(r" +$", "", page, flags=re.MULTILINE)
