"""Hostile files passed to the command: one line, exit code 2, and no other effect."""

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


class Runs:
    """Pickled as code that creates a folder."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._witness),)


def outcomes(
    cases: dict[str, list[str]], folder: Path, seconds: int = 10
) -> dict[str, tuple[int, str]]:
    """Name -> exit code and standard error of ``main`` with these arguments."""
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    script = Path(__file__).with_name("hostile_runs.py")
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            str(folder / "cases.json"),
            str(folder / "outside"),
            str(seconds),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_hostile_configs(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    runs = f'SEED: !!python/object/apply:os.mkdir ["{witness}"]\n'
    (tmp_path / "base.yaml").write_text(runs)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "link.yaml").symlink_to(tmp_path / "base.yaml")
    laughs = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
        for before, after in zip("abcdefgh", "bcdefghi", strict=True)
    )
    corpus = {
        "runs": (runs, "could not determine a constructor"),
        "name": ("SEED: !!python/name:os.system\n", "could not determine a constructor"),
        "laughs": (laughs, "unknown key 'a'"),
        "alias": ("a: &a [*a]\n", "unknown key 'a'"),
        "deep": ("a: " + "[" * 100_000, "nested too deeply"),
        "wide": ("a: [" + "1," * 30_000 + "]", "unknown key 'a'"),
        "large": ("#" * 2**21, "not a mapping"),
        "lines": ("\n" * (2**20 - 1), "not a mapping"),
        "twice": ("SEED: 1\nSEED: 2\n", "a second time"),
        "itself": ("_BASE_: itself.yaml\n", "leads back to itself"),
        "url": ("_BASE_: http://127.0.0.1:9/a.yaml\n", "does not exist"),
        "relative": ("_BASE_: ../base.yaml\n", "could not determine a constructor"),
        "absolute": (f"_BASE_: {tmp_path}/base.yaml\n", "could not determine a constructor"),
        "linked": ("_BASE_: link.yaml\n", "could not determine a constructor"),
        "device": ("_BASE_: /dev/zero\n", "does not exist"),
        "python": (f"_BASE_: lazy.py\nSEED: '{witness}'\n", "Lazy (Python) configs"),
        "literal": ('SEED: "' + "-" * 4000 + '1"\n', "nested too deeply"),
        "brackets": ('SEED: "' + "[" * 4000 + '"\n', "SEED"),
        "batch": ("SOLVER: {IMS_PER_BATCH: -1}\n", "SOLVER.IMS_PER_BATCH is -1"),
        "rate": ("SOLVER: {BASE_LR: .nan}\n", "SOLVER.BASE_LR is nan"),
        "infinite": ('SOLVER: {BASE_LR: "1e999"}\n', "SOLVER.BASE_LR is inf"),
        "trust": ("trust_checkpoint: true\n", "unknown key 'trust_checkpoint'"),
    }
    for name, (text, _) in corpus.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "lazy.py").write_text(f"import os\nos.mkdir({str(witness)!r})\n")
    cases = {name: ["--config-file", str(folder / f"{name}.yaml")] for name in corpus}
    cases["lazy"] = ["--config-file", str(folder / "lazy.py")]
    expected = {name: message for name, (_, message) in corpus.items()}
    expected["lazy"] = "Lazy (Python) configs are not loaded"
    require_one_line(outcomes(cases, tmp_path), {**expected})
    assert not witness.exists()


def test_hostile_weights(tmp_path: Path, tiny_config: Path) -> None:
    witness = tmp_path / "witness"
    (tmp_path / "outside").mkdir()
    call = {"model": Runs(witness)}
    nan = {"model": {"w": np.array([np.nan])}, "__author__": "x"}
    corpus = {
        "call.pkl": (pickle.dumps(call), "may run code"),
        "claims.pkl": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "cannot be loaded"),
        "memo.pkl": (b"\x80\x02}r\xff\xff\xff\x7f.", "cannot be loaded"),
        "steps.pkl": (b"\x80\x02" + b"N0" * 600_000 + b".", "cannot be loaded"),
        "nan.pkl": (pickle.dumps(nan), "NaN or infinite values in 1 of 1 tensors: w"),
        "noise.pth": (np.random.default_rng(0).bytes(5000), "cannot be loaded"),
        "nothing.pth": (b"", "the file is empty"),
    }
    for name, (content, _) in corpus.items():
        (tmp_path / name).write_bytes(content)
    torch.save(call, tmp_path / "call.pth")
    torch.save({"model": {"w": torch.zeros(1).expand(10**9)}}, tmp_path / "view.pth")
    expected = {name: message for name, (_, message) in corpus.items()}
    expected |= {"call.pth": "--trust-checkpoint", "view.pth": "do not fit this model"}
    common = ["--config-file", str(tiny_config), "--eval-only", "MODEL.WEIGHTS"]
    cases = {name: [*common, str(tmp_path / name)] for name in expected}
    require_one_line(outcomes(cases, tmp_path), expected)
    assert not witness.exists()


def test_a_file_that_takes_forever_is_harmless(tmp_path: Path, tiny_config: Path) -> None:
    """Python needs 2**60 steps to hash the key, and reading ends only when the user ends it."""
    witness = tmp_path / "witness"
    endless = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s"
    call = pickle.dumps(Runs(witness), protocol=2)[2:]
    common = ["--config-file", str(tiny_config), "--eval-only", "MODEL.WEIGHTS"]
    cases = {}
    for name in ("endless.pkl", "endless.pth"):
        (tmp_path / name).write_bytes(endless + call)
        cases[name] = [*common, str(tmp_path / name)]
    codes = {code for code, _ in outcomes(cases, tmp_path, seconds=3).values()}
    assert codes <= {2, -signal.SIGVTALRM}
    assert not witness.exists()


def test_only_the_flag_allows_a_full_pickle(tmp_path: Path, tiny_config: Path) -> None:
    witness = tmp_path / "witness"
    (tmp_path / "own.pkl").write_bytes(pickle.dumps({"model": Runs(witness), "__author__": "x"}))
    common = ["--config-file", str(tiny_config), "--eval-only"]
    opts = ["MODEL.WEIGHTS", str(tmp_path / "own.pkl")]
    cases = {"trusted": [*common, "--trust-checkpoint", *opts]}
    (code, line) = outcomes(cases, tmp_path)["trusted"]
    # The pickle has run and created something that is not a model.
    assert code == 2 and "no tensors" in line and witness.exists()


def image(mode: str, kind: str, size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    made = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
        if mode == "I;16"
        else Image.fromarray(pixels, mode if mode == "CMYK" else None)
    )
    made.save(file, kind, **options)
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG file that claims a large size."""
    content = bytearray(image("RGB", "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image("RGB", "JPEG", exif=exif)


def with_text(count: int) -> bytes:
    """A PNG whose comment is small only while compressed."""
    content = image("RGB", "PNG")
    text = b"zTXtc\0\0" + zlib.compress(bytes(count))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return content[:33] + chunk + content[33:]


def test_hostile_images(
    tmp_path: Path, small_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image with the check before the training and with DATA_CHECK off; with "" it trains."""
    secret = tmp_path / "outside" / "secret.png"
    secret.parent.mkdir()
    secret.write_bytes(image("RGB", "PNG"))
    corpus: dict[str, tuple[bytes, str, str]] = {
        "truncated": (image("RGB", "JPEG")[:900], "", "cannot be read"),
        "bomb": (claiming(60_000, 60_000), "file-bomb", "INPUT.MAX_PIXELS"),
        "claims": (claiming(12_000, 12_000), "file-size", "cannot be read"),
        "text": (with_text(2**27), "file-unreadable", "too large"),
        "noise": (np.random.default_rng(0).bytes(500), "file-unreadable", "unsupported format"),
        "empty": (b"", "file-unreadable", "empty file"),
        "script": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n",
            "file-unreadable",
            "unsupported format",
        ),
        "turned": (turned(), "file-rotated", "SizeMismatchError"),
        "thin": (image("RGB", "PNG", (1, 40)), "file-thin", "SizeMismatchError"),
        "deep": (image("I;16", "PNG"), "", ""),
        "cmyk": (image("CMYK", "JPEG"), "", ""),
        "alpha": (image("RGBA", "PNG"), "", ""),
        "link": (b"", "file-outside", "open"),
        "pipe": (b"", "file-unreadable", "pipe"),
    }
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    cases, expected = {}, {}
    keys = ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-6", "MODEL.RESNETS.NORM", "FrozenBN"]
    for name, (content, checked, off) in corpus.items():
        folder = tmp_path / "data" / name
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "a.png").write_bytes(content)
        mask = [5, 5, 25, 5, 25, 15, 5, 15]
        box = {"bbox": [5, 5, 20, 10], "segmentation": [mask], "area": 200, "iscrowd": 0}
        coco = {
            "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **box}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (folder / "train.json").write_text(json.dumps(coco))
        modes = {"strict": checked or off, "off": off}
        # Without the check, a user may name a link or pipe; images that train need no second run.
        if name in ("link", "pipe") or not off:
            modes.pop("off")
        if name in ("link", "pipe"):
            (folder / "images" / "a.png").unlink()
        if name == "link":
            (folder / "images" / "a.png").symlink_to(secret)
        elif name == "pipe":
            os.mkfifo(folder / "images" / "a.png")
        for mode, message in modes.items():
            case = f"{name} {mode}"
            out = ["OUTPUT_DIR", str(tmp_path / case), "DATA_CHECK", mode]
            train = ["DATASETS.TRAIN", f"('{name}_train',)"]
            cases[case] = ["--config-file", str(small_config), *keys, *out, *train]
            expected[case] = message
    results = outcomes(cases, tmp_path)
    require_one_line(results, {case: message for case, message in expected.items() if message})
    assert [results[case][0] for case, message in expected.items() if not message] == [0] * 3


def require_one_line(results: dict[str, tuple[int, str]], expected: dict[str, str]) -> None:
    wrong = {}
    for name, message in expected.items():
        code, text = results[name]
        # On a machine with nvcc and no GPU, torch prints one line of its own.
        lines = [line for line in text.strip().splitlines() if "cpp_extension.py" not in line]
        one_line = len(lines) == 1 and lines[0].startswith("error: ")
        if code != 2 or not one_line or message not in text:
            wrong[name] = (code, text[-600:])
    assert not wrong
