"""What a config file may hold and read, and what it is refused for."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.config.reading import read_config_file


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_root_is_the_nearest_folder_named_configs(tmp_path: Path) -> None:
    write(tmp_path / "configs" / "base.yaml", "SEED: 3\n")
    config = write(tmp_path / "configs" / "a" / "b" / "own.yaml", "_BASE_: ../../base.yaml\n")
    assert read_config_file(str(config)) == {"SEED": 3}


def test_lists_of_bases_go_from_left_to_right(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "SOLVER: {MAX_ITER: 1, BASE_LR: 0.5}\n")
    write(tmp_path / "b.yml", "SOLVER: {MAX_ITER: 2}\n")
    config = write(tmp_path / "own.yaml", "_BASE_: [a.yaml, b.yml]\nSEED: 4\n")
    assert read_config_file(str(config)) == {"SOLVER": {"MAX_ITER": 2, "BASE_LR": 0.5}, "SEED": 4}


def test_an_absolute_base_and_a_link_inside_the_root_are_read(tmp_path: Path) -> None:
    base = write(tmp_path / "sub" / "base.yaml", "SEED: 3\n")
    (tmp_path / "link.yaml").symlink_to(base)
    for name in (base, "link.yaml"):
        config = write(tmp_path / "own.yaml", f"_BASE_: {name}\n")
        assert read_config_file(str(config)) == {"SEED": 3}


@pytest.mark.parametrize("how", ["relative", "absolute", "link", "folder link"])
def test_a_base_outside_the_root_is_not_opened(tmp_path: Path, how: str) -> None:
    secret = write(tmp_path / "secret.yaml", "SEED: 3\n")
    secret.chmod(0)
    root = tmp_path / "project" / "configs"
    root.mkdir(parents=True)
    (root / "link.yaml").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    base = {
        "relative": "../../secret.yaml",
        "absolute": str(secret),
        "link": "link.yaml",
        "folder link": "folder/secret.yaml",
    }[how]
    config = write(root / "own.yaml", f"_BASE_: {base}\n")
    with pytest.raises(UserError, match="leads out of the config root") as refusal:
        read_config_file(str(config))
    assert str(root) in str(refusal.value)


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "URL base": ("_BASE_: http://localhost/a.yaml\n", "is no file"),
    "zoo base": ("_BASE_: detectron2://a.yaml\n", "is no file"),
    "Python base": ("_BASE_: lazy.py\n", "Lazy (Python) configs are not loaded"),
    "other base": ("_BASE_: /dev/zero\n", "leads out of the config root"),
    "base without an ending": ("_BASE_: base\n", "has to end in .yaml or .yml"),
    "base that is a number": ("_BASE_: 3\n", "has to be a path"),
    "base of itself": ("_BASE_: ./config.yaml\n", "leads back to itself"),
    "billion laughs": (LAUGHS, "beyond 5000 values"),
    "alias to itself": ("a: &a [*a]\n", "nested deeper than 20 levels"),
    "deep lists": ("a: " + "[" * 900 + "]" * 900, "nested deeper than 20 levels"),
    "a long list": ("a: [" + "1," * 300_000 + "]", "beyond 5000 values"),
    "a large file": ("#" * 2**20 + "\n", "larger than any config"),
    "a long value": ("OUTPUT_DIR: " + "x" * 5000, "more than 4096 characters"),
    "a key twice": ("SEED: 1\nSOLVER: {}\nSEED: 2\n", "line 3 has the key 'SEED' a second time"),
    "a number as key": ("1: 2\n", "a key that is no string"),
    "a list as key": ("? [1]\n: 2\n", "a key that is no string"),
    "a dotted key": ("SOLVER.MAX_ITER: 2\n", "write groups in groups"),
    "a line end in a key": ('"a\\nb": 2\n', "which is no key"),
    "merge key": ("a: &a {b: 1}\nc: {<<: *a}\n", "'<<'"),
    "Python tag": ("SEED: !!python/name:os.system x\n", "has the tag"),
    "own tag": ("SEED: !mine 3\n", "has the tag '!mine'"),
    "binary": ("SEED: !!binary aGk=\n", "has the tag"),
    "a tag that lies": ("SEED: !!int abc\n", "'abc', which is no int"),
    "NUL": ("SEED: \0", "no plain YAML"),
    "two documents": ("SEED: 1\n---\nSEED: 2\n", "no plain YAML"),
    "a list": ("- 1\n", "not a mapping"),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_no_config_needs_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    config = write(tmp_path / "config.yaml", text)
    with pytest.raises(UserError) as refusal:
        read_config_file(str(config))
    message = str(refusal.value)
    assert expected in message and str(config) in message
    assert message.isprintable() and len(message) < 600


def test_a_long_chain_and_a_wide_one_are_refused(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"{number}.yaml", f"_BASE_: {number + 1}.yaml\n")
    with pytest.raises(UserError, match="number 9 in a row"):
        read_config_file(str(tmp_path / "0.yaml"))
    for number in range(5):
        write(tmp_path / f"w{number}.yaml", f"_BASE_: [{f'w{number + 1}.yaml,' * 9}]\n")
    write(tmp_path / "w5.yaml", "SEED: 1\n")
    with pytest.raises(UserError, match="larger than any config"):
        read_config_file(str(tmp_path / "w0.yaml"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, expected in (
        ("lazy.py", "Lazy (Python) configs are not loaded"),
        ("config.json", "has to end in"),
        ("fifo.yaml", "does not exist"),
        ("nul\0.yaml", "does not exist"),
        ("x" * 5000 + ".yaml", "cannot be opened"),
    ):
        with pytest.raises(UserError) as refusal:
            read_config_file(str(tmp_path / name))
        assert expected in str(refusal.value)


def test_a_date_is_a_string(tmp_path: Path) -> None:
    config = write(tmp_path / "config.yaml", "OUTPUT_DIR: 2026-11-21\n")
    assert load_config(config).OUTPUT_DIR == "2026-11-21"


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
def test_whatever_the_file_holds_it_is_a_value_or_one_line(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        values = read_config_file(str(config))
    except UserError as refusal:
        assert str(refusal).isprintable()
        return
    assert isinstance(values, dict) and "_BASE_" not in values
    try:
        load_config(config)
    except UserError as refusal:
        assert "\n" not in str(refusal)
