"""Config files: contents that are read or refused."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mask_rcnn_plus import UserError, get_cfg, load_config
from mask_rcnn_plus.config import parse_config


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_base_may_be_in_another_folder(tmp_path: Path) -> None:
    write(tmp_path / "configs" / "base.yaml", "SEED: 3\n")
    config = write(tmp_path / "configs" / "a" / "b" / "own.yaml", "_BASE_: ../../base.yaml\n")
    assert load_config(config).SEED == 3


def test_later_bases_override_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "SOLVER: {MAX_ITER: 1, BASE_LR: 0.5}\n")
    write(tmp_path / "b.yml", "SOLVER: {MAX_ITER: 2}\n")
    cfg = load_config(write(tmp_path / "own.yaml", "_BASE_: [a.yaml, b.yml]\nSEED: 4\n"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (2, 0.5, 4)


@pytest.mark.parametrize("how", ["relative", "absolute", "link", "folder link", "home"])
def test_a_base_may_be_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    base = write(tmp_path / "base.yaml", "SEED: 3\n")
    root = tmp_path / "project" / "configs"
    root.mkdir(parents=True)
    (root / "link.yaml").symlink_to(base)
    (root / "folder").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = {
        "relative": "../../base.yaml",
        "absolute": str(base),
        "link": "link.yaml",
        "folder link": "folder/base.yaml",
        "home": "~/base.yaml",
    }[how]
    assert load_config(write(root / "own.yaml", f"_BASE_: {path}\n")).SEED == 3


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "URL base": ("_BASE_: http://localhost/a.yaml\n", "'http://localhost/a.yaml' does not exist"),
    "zoo base": ("_BASE_: detectron2://a.yaml\n", "'detectron2://a.yaml' does not exist"),
    "Python base": ("_BASE_: lazy.py\n", "Lazy (Python) configs are not loaded"),
    "device base": ("_BASE_: /dev/zero\n", "'/dev/zero' does not exist"),
    "base without an ending": ("_BASE_: base\n", "'base' does not exist"),
    "base that is a folder": ("_BASE_: ..\n", "is a folder"),
    "base that is a number": ("_BASE_: 3\n", "must be a path"),
    "base of itself": ("_BASE_: ./config.yaml\n", "leads back to itself"),
    "billion laughs": (LAUGHS, "unknown key 'a'"),
    "alias to itself": ("a: &a [*a]\n", "unknown key 'a'"),
    "group in itself": ("SOLVER: &a {SOLVER: *a}\n", "nested too deeply"),
    "deep lists": ("a: " + "[" * 900 + "]" * 900, "nested too deeply"),
    "a long list": ("a: [" + "1," * 30_000 + "]", "unknown key 'a'"),
    "only a comment": ("#" * 2**16 + "\n", "not a mapping"),
    "a key twice": ("SEED: 1\nSOLVER: {}\nSEED: 2\n", "'SEED' occurs a second time"),
    "a number as key": ("1: 2\n", "unknown key '1'"),
    "a list as key": ("? [1]\n: 2\n", "unhashable key"),
    "a dotted key": ("SOLVER.MAX_ITER: 2\n", "write groups in groups"),
    "a line end in a key": ('"a\\nb": 2\n', "unknown key 'a b'"),
    "merge key": ("a: &a {b: 1}\nc: {<<: *a}\n", "unknown key 'a.b'"),
    "Python tag": ("SEED: !!python/name:os.system x\n", "could not determine a constructor"),
    "Python call": (
        "SEED: !!python/object/apply:os.mkdir [executed]\n",
        "could not determine a constructor",
    ),
    "own tag": ("SEED: !mine 3\n", "'!mine'"),
    "binary": ("SEED: !!binary aGk=\n", "an integer"),
    "a wrong tag": ("SEED: !!int abc\n", "'abc'"),
    "a huge number": ("SEED: 0x" + "f" * 5000, "limit"),
    "NUL": ("SEED: \0", "not plain YAML"),
    "two documents": ("SEED: 1\n---\nSEED: 2\n", "not plain YAML"),
    "a list": ("- 1\n", "not a mapping"),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_an_unusable_file_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "config.yaml", text)
    with pytest.raises(UserError) as refusal:
        load_config(config)
    message = str(refusal.value)
    assert expected in message and str(config) in message
    assert message.isprintable() and len(message) < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]  # no code ran


def test_a_second_occurrence_of_a_key_is_named_by_its_line(tmp_path: Path) -> None:
    config = write(tmp_path / "config.yaml", "SEED: 1\nSOLVER: {BASE_LR: 0.1}\nSEED: 2\n")
    with pytest.raises(UserError, match="line 3"):
        load_config(config)


BOMB = LAUGHS.replace("a: &a", "SOLVER:\n  STEPS: &a").replace("\n", "\n  ")

REFUSED_IN_CHECKPOINTS = {
    **{name: row for name, row in REFUSED.items() if not row[0].startswith("_BASE_")},
    "base": ("_BASE_: config.yaml\n", "_BASE_ is only supported in files"),
    "billion laughs": (LAUGHS, "values, with aliases expanded"),
    "billion laughs in a known key": (
        "SOLVER: {STEPS: &s [1]}\n" + LAUGHS,
        "values, with aliases expanded",
    ),
    "alias to itself": ("a: &a [*a]\n", "nested too deeply"),
    "alias to itself in a known key": ("SEED: &a [*a]\n", "nested too deeply"),
    "a large text": ("#" * 2**20 + "\n", "characters"),
}


@pytest.mark.parametrize(
    ("text", "expected"), REFUSED_IN_CHECKPOINTS.values(), ids=REFUSED_IN_CHECKPOINTS
)
def test_an_unusable_config_in_a_checkpoint_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "config.yaml", "SEED: 3\n")
    with pytest.raises(UserError) as refusal:
        parse_config(text, "the config in weights 'x.pth'")
    message = str(refusal.value)
    assert expected in message and "x.pth" in message
    assert message.isprintable() and len(message) < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]  # no code ran


def test_a_config_in_a_checkpoint_may_share_lists() -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    text = yaml.safe_dump({"DATASETS": {"TRAIN": (shared := ["mine"]), "TEST": shared}})
    assert "*id001" in text
    assert parse_config(text, "it").DATASETS == cfg.DATASETS


def test_a_long_chain_and_a_wide_one_are_read(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"{number}.yaml", f"_BASE_: {number + 1}.yaml\n")
    write(tmp_path / "12.yaml", "SEED: 7\n")
    assert load_config(tmp_path / "0.yaml").SEED == 7
    for number in range(2):
        write(tmp_path / f"w{number}.yaml", f"_BASE_: [{f'w{number + 1}.yaml,' * 9}]\n")
    write(tmp_path / "w2.yaml", "SEED: 1\n")
    assert load_config(tmp_path / "w0.yaml").SEED == 1


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    write(tmp_path / "b.yaml", "_BASE_: ./a.yaml\n")
    with pytest.raises(UserError, match=r"a.yaml' leads back to itself"):
        load_config(tmp_path / "a.yaml")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"OUTPUT_DIR: \xe4\n")
    for name, expected in (
        ("lazy.py", "Lazy (Python) configs are not loaded"),
        ("config.json", "does not exist"),
        ("fifo.yaml", "does not exist"),
        ("nul\0.yaml", "does not exist"),
        ("x" * 5000 + ".yaml", "cannot be opened"),
        ("latin.yaml", "cannot be opened"),
        ("", "is a folder"),
    ):
        with pytest.raises(UserError) as refusal:
            load_config(tmp_path / name)
        assert expected in str(refusal.value)


def test_a_date_and_a_long_value_are_strings(tmp_path: Path) -> None:
    for text in ("2026-11-21", "x" * 5000):
        config = write(tmp_path / "config.yaml", f"OUTPUT_DIR: {text}\n")
        assert text == load_config(config).OUTPUT_DIR


def test_a_merge_key_copies_a_group(tmp_path: Path) -> None:
    text = "MODEL:\n  ROI_BOX_HEAD: &head {POOLER_RESOLUTION: 9}\n  ROI_MASK_HEAD: {<<: *head}\n"
    cfg = load_config(write(tmp_path / "config.yaml", text))
    assert cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION == 9


def test_deep_literals_in_strings_are_refused(tmp_path: Path) -> None:
    # yacs reads strings as Python literals.
    for text in ("-" * 4000 + "1", "(" * 4000, "[" * 150 + "]" * 150, "1+" * 2000 + "1"):
        config = write(tmp_path / "config.yaml", f'SEED: "{text}"\n')
        with pytest.raises(UserError):
            load_config(config)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["SOLVER", "MODEL", "BASE_LR", "_BASE_", "RPN", "SEED", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
PIECES = [
    "SOLVER:",
    "SEED",
    ": ",
    "\n",
    "  ",
    "- ",
    "&a ",
    "*a",
    "!!int ",
    "!x ",
    "{",
    "}",
    "[",
    "]",
]
PIECES += [
    '"',
    "'",
    "|",
    ">",
    "? ",
    "<<: ",
    "#",
    "_BASE_: ",
    "config.yaml",
    "1e999",
    ".nan",
    "0x",
    "%",
]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)
    | TREES.map(json.dumps)
)
def test_any_text_is_a_config_or_one_line(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (lambda: load_config(config), lambda: parse_config(text, "a checkpoint")):
        try:
            cfg = read()
        except UserError as refusal:
            assert str(refusal).isprintable() and "\n" not in str(refusal)
        else:
            assert cfg.keys() == get_cfg().keys() and "_BASE_" not in cfg


@pytest.mark.parametrize("base", ["~no_such_user/x.yaml", "a\\0.yaml", "loop.yaml"])
def test_a_base_that_cannot_be_opened_is_one_line(tmp_path: Path, base: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(f'_BASE_: "{base}"')
    with pytest.raises(UserError, match="_BASE_") as error:
        load_config(path)
    assert "\n" not in str(error.value)
