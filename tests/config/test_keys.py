"""Reading a config: defaults, file, command line."""

from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg as detectron2_config

from mask_rcnn_plus import UserError, get_cfg, load_config
from mask_rcnn_plus.config import with_values
from tests.test_configs import leaves

ROOT = Path(__file__).parents[2]
TRAINING_KEYS = (
    *("INPUT.", "SOLVER.", "MODEL.FREEZE", "MODEL.ROI_BOX_HEAD."),
    *("TEST.BEST_", "TEST.LOSS_", "TEST.EARLY_STOPPING."),
)


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_base_then_file_then_command_line(tmp_path: Path) -> None:
    write(tmp_path, "SOLVER:\n  MAX_ITER: 7\n  BASE_LR: 0.5\n  IMS_PER_BATCH: 3\n", "base.yaml")
    config = write(tmp_path, "_BASE_: base.yaml\nSOLVER:\n  BASE_LR: 0.25\n  IMS_PER_BATCH: 4\n")
    cfg = load_config(config, ["SOLVER.IMS_PER_BATCH", "5", "DATASETS.TRAIN", "('a', 'b')"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (7, 0.25, 5)
    assert cfg.DATASETS.TRAIN == ("a", "b")


def test_a_saved_config_reads_back_the_same(tmp_path: Path) -> None:
    cfg = get_cfg()
    again = load_config(write(tmp_path, cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SOLVER:\n  MAX_ITERS: 5\n", "unknown key 'SOLVER.MAX_ITERS'; did you mean"),
        ("SOLVER: 5\n", "group of keys"),
        ("SOLVER:\n  MAX_ITER: five\n", "SOLVER.MAX_ITER is 'five': it must be an integer"),
        ("_BASE_: nope.yaml\n", "nope.yaml' does not exist"),
        ("_BASE_: config.yaml\n", "leads back to itself"),
        ("- 1\n- 2\n", "not a mapping"),
        ("", "not a mapping"),
        ("a: [1", "not plain YAML"),
        ("VERSION: 1\n", "VERSION 1: convert it"),
        ("VERSION: 99\n", "VERSION 99: only VERSION 2"),
        ("SEED: [1, 2\nSOLVER: {}\n", "line 2, column 7: expected ',' or ']'"),
        ("DATASETS:\n  TRAIN: [a\n", "but got the end of the file"),
        ("SEED: '\x00'\n", "character 0x0 at position 7"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    config = write(tmp_path, text)
    with pytest.raises(UserError) as refusal:
        load_config(config)
    message = str(refusal.value)
    assert expected in message and str(config) in message and "\n" not in message


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["SOLVER.BASE_LR"], "has no value"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR is 'fast': it must be a number"),
        (["SOLVER.BASE_LRR", "0.1"], "did you mean 'SOLVER.BASE_LR'?"),
        (["SOLVER", "0.1"], "group of keys"),
        (["VERSION", "99"], "VERSION is 99: it must be 2"),
        (["MODEL.MASK_ON", "yes"], "it must be True or False"),
        (["DATASETS.TRAIN", "mine"], "it must be a list; write"),
        (["SOLVER.BASE_LR", "0.1", "--eval-only"], "--eval-only"),
    ],
)
def test_a_broken_override_is_refused_in_one_line(
    tmp_path: Path, opts: list[str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected.replace("?", r"\?")) as refusal:
        load_config(write(tmp_path, "SEED: 1\n"), opts)
    assert "\n" not in str(refusal.value)


def test_a_copy_with_other_values_leaves_the_config(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "SEED: 1\n"))
    cfg.freeze()
    copy = with_values(cfg, {"MODEL.ROI_HEADS.NUM_CLASSES": 3, "SEED": 2})
    assert (copy.MODEL.ROI_HEADS.NUM_CLASSES, copy.SEED, copy.is_frozen()) == (3, 2, True)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.SEED, cfg.is_frozen()) == (80, 1, True)


def test_only_near_names_of_files_are_suggested(tmp_path: Path) -> None:
    near = write(tmp_path, "SEED: 1\n", "small_data.yaml")
    for name, suggested in (
        ("smal_data.yaml", True),
        ("small_data.yml", True),
        ("nope.yaml", False),
    ):
        with pytest.raises(UserError) as refusal:
            load_config(tmp_path / name)
        assert (f"did you mean '{near}'?" in str(refusal.value)) is suggested


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_config_of_the_project_reads(path: Path) -> None:
    load_config(path)


def test_docs_describe_every_training_option_and_its_cost() -> None:
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "training.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    assert all(len(row) == 4 and all(cell.strip(" |") for cell in row) for row in rows)
    own = dict(leaves(get_cfg())).keys() - dict(leaves(detectron2_config())).keys()
    training = [key for key in own if key.startswith(TRAINING_KEYS)]
    assert len(training) > 30
    for key in training:
        section, _, name = key.rpartition(".")
        named = [row for row in rows if f"`{key}`" in row[0]]
        named += [row for row in rows if f"`{section}" in row[0] and f"`{name}`" in row[0]]
        assert named, f"docs/training.md has no line of {key}"
