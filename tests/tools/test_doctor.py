"""mask-rcnn-plus doctor, on this machine as it is and as it might be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mask_rcnn_plus import ops
from mask_rcnn_plus.compat import apply
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.doctor import probes, self_test
from mask_rcnn_tools.doctor.examination import look_at_machine
from mask_rcnn_tools.doctor.findings import findings
from mask_rcnn_tools.doctor.report import text

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str, root: Path = ROOT) -> tuple[int, dict[str, Any]]:
    """The command as it starts, with a folder's modules in the place of those installed."""
    done = subprocess.run(
        [sys.executable, "-m", "mask_rcnn_tools.cli", "doctor", "--json", "-", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> dict[str, Any]:
    """What the doctor says here."""
    path = tmp_path_factory.mktemp("doctor") / "doctor.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes_root))
        assert main(["doctor", "--json", str(path), "--output", str(path.parent / "new")]) == 0
    return json.loads(path.read_text())


def test_a_sound_machine_is_healthy(report: dict[str, Any]) -> None:
    assert report["healthy"] and report["broken"] == []
    assert report["torch"]["version"] == torch.__version__
    assert report["detectron2"]["patches"] == apply()
    assert report["detectron2"]["origin"] in ("upstream 0.6", "source", "redistribution")
    assert report["operators"]["backend"]["cpu"] == ops.backend("cpu")
    assert report["machine"]["output"]["free"] > 0 and report["machine"]["output"]["writable"]
    sets = report["datasets"]["by folder"]
    assert {"shapes_train", "shapes_val"} <= sets.keys()
    assert sets["shapes_train"]["entries"] > 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder where not even root makes files")
def test_an_output_folder_that_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = list(tmp_path.iterdir())
    for folder, writable in (
        (tmp_path / "new" / "deep", True),
        (tmp_path / "file", False),
        (tmp_path / "file" / "output", False),
        (Path("/proc/output"), False),
    ):
        assert look_at_machine(folder)["output"]["writable"] is writable, folder
    assert list(tmp_path.iterdir()) == before


def test_every_operator_is_tested_on_every_device(report: dict[str, Any]) -> None:
    results = {(r["device"], r["operator"]): r for r in report["self_test"]["results"]}
    assert {device for device, _ in results} == set(self_test.devices())
    names = {name.split(",")[0] for _, name in results}
    modes = {f"{n} {m}" for n in ("roi_align", "fpn_roi_align", "roi_warp") for m in ("avg", "max")}
    assert names == modes | {"roi_pool", "paste_masks_rle"}
    for (_, name), result in results.items():
        assert result["ok"] and result["forward"] < 1e-5
        assert name == "paste_masks_rle" or result["backward"] < 1e-5


def test_the_report_for_people_says_it_all(report: dict[str, Any]) -> None:
    shown = text(report)
    for word in (
        torch.__version__,
        "pycocotools",
        "layers",
        "roi_warp max",
        "shapes_val",
        "/dev/shm",
    ):
        assert word in shown
    assert text({**report, "advice": []}).splitlines()[-1] == "healthy"
    # Whoever reads the last line alone must not miss it.
    advised = text({**report, "advice": ["install a compiler"]})
    assert "the advice above" in advised.splitlines()[-1]
    spoilt = {**report, "broken": ["a thing: it fails"], "self_test": {"error": "ends"}}
    assert "1 thing is broken" in text(spoilt) and "  - a thing: it fails" in text(spoilt)


def test_it_runs_where_detectron2_and_a_library_are_broken(tmp_path: Path) -> None:
    # A copy of the package whose compiled library is none.
    root = tmp_path / "copy"
    shutil.copytree(
        ROOT / "mask_rcnn_plus",
        root / "mask_rcnn_plus",
        ignore=shutil.ignore_patterns("*.so", "csrc"),
    )
    shutil.copytree(ROOT / "mask_rcnn_tools", root / "mask_rcnn_tools")
    (root / "mask_rcnn_plus" / "ops" / "_roi_cpu.abi3.so").write_bytes(b"\x7fELF no library")
    folder = tmp_path / "modules"
    (folder / "detectron2").mkdir(parents=True)
    (folder / "detectron2" / "__init__.py").write_text(
        "raise ImportError('built for another torch')"
    )
    # One that takes the process with it.
    (folder / "cv2.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    code, report = run(folder, root=root)
    assert code == 1 and not report["healthy"]
    said = "\n".join(report["broken"])
    assert "a library: ends the process by SIGSEGV" in said
    assert "_roi_cpu.abi3.so does not load" in said and "reinstall mask-rcnn-plus" in said
    assert "built for another torch" in said
    assert report["detectron2"]["origin"]  # found without importing it
    # The operators work all the same, through torchvision.
    assert report["operators"]["backend"]["cpu"] == "torchvision"
    assert all(result["ok"] for result in report["self_test"]["results"])
    assert "mask_rcnn_plus does not import" in text(report)


def test_it_runs_where_torch_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    code, report = run(tmp_path)
    assert code == 1
    assert any("install torch" in sentence for sentence in report["broken"])
    versions = [line.split() for line in text(report).splitlines()]
    assert ["torch", "does", "not", "import"] in versions


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    good = ops.roi_align
    monkeypatch.setattr(ops, "roi_align", lambda *args: good(*args) * 1.01)
    wrong = [result["operator"] for result in self_test.run("cpu") if not result["ok"]]
    assert len(wrong) == 4 and all(name.startswith("roi_align") for name in wrong)
    assert (
        sum("is wrong: forward off by" in sentence for sentence in probes.self_test()["broken"])
        == 4
    )

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(ops, "roi_pool", fail)
    assert any("no kernel image" in sentence for sentence in probes.self_test()["broken"])


def test_libraries_for_another_cuda_or_gpu() -> None:
    assert probes.mismatch("13.0", "13.1") == "" == probes.mismatch("13.0", None)
    assert "CUDA 13.0, and torch with 12.8: reinstall" in probes.mismatch("13.0", "12.8")
    assert probes.covers(["sm_80"], 8, 6) and not probes.covers(["sm_80"], 9, 0)
    assert probes.covers(["sm_80", "compute_80"], 9, 0) and not probes.covers(["sm_86"], 8, 0)
    assert probes.covers(["sm_90a", "sm_120"], 12, 0)
    # What is newer takes PTX.
    assert probes.older(["8.0", "12.0"], 8, 0) == "" == probes.older(["9.0"], 13, 0)
    assert probes.older([], 5, 0) == ""
    assert "with TORCH_CUDA_ARCH_LIST=7.0" in probes.older(["10.0", "7.5"], 7, 0)


def test_an_instruction_set_held_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.backend("cpu") != "native":
        pytest.skip("no compiled operators")
    monkeypatch.setenv("MASK_RCNN_PLUS_CPU_ISA", "avx1024")
    assert any("'avx1024', which is not what is used" in s for s in probes.operators()["advice"])
    monkeypatch.setenv("MASK_RCNN_PLUS_CPU_ISA", torch.ops.mask_rcnn_plus.cpu_isa())
    assert any("holds the operators to" in s for s in probes.operators()["advice"])


def advice(report: dict[str, Any], **machine: Any) -> str:
    quiet = {
        "load": 0.0,
        "quota": None,
        "cores": 4,
        "shm": 2**34,
        "driver": "",
        "environment": {},
        "memory": {"total": 2**34, "available": 2**34},
        "output": {"folder": "/output", "free": 2**40, "writable": True},
        "datasets": {"folder": "/datasets", "exists": True, "free": 2**40, "variable": True},
    }
    facts = {
        "torch": {"version": "2.14.1", "CUDA": "13.0", "threads": 4, "devices": []},
        "datasets": report["datasets"],
        "python": report["python"],
    }
    broken, said = findings({**facts, "machine": {**quiet, **machine}})
    assert not broken
    return "\n".join(said)


def test_advice(report: dict[str, Any]) -> None:
    assert advice(report) == ""
    assert "OMP_WAIT_POLICY=PASSIVE" in advice(report, load=3.5)
    assert "PASSIVE" not in advice(report, load=3.5, environment={"OMP_WAIT_POLICY": "passive"})
    assert "OMP_NUM_THREADS=2" in advice(report, quota=2.0)
    assert "--shm-size" in advice(report, shm=2**26)
    assert "sees no GPU" in advice(report, driver="580.1")
    assert "SOLVER.IMS_PER_BATCH" in advice(report, memory={"total": 2**34, "available": 2**29})
    full = {"folder": "/output", "free": 2**20, "writable": True}
    assert "1 MiB are free for '/output'" in advice(report, output=full)
    closed = {**full, "writable": False}
    assert "cannot be written into" in advice(report, output=closed)
    gone = {"folder": "/datasets", "exists": False, "free": 1, "variable": False}
    assert "DETECTRON2_DATASETS" in advice(report, datasets=gone)
    assert "datasets/README.md" in advice({**report, "datasets": {"by folder": {}, "builtin": []}})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--json", "nowhere/doctor.json"], "a folder that exists"),
        (["--json", __file__], "--overwrite"),
        (["--jsn", "x"], "unrecognized arguments"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and expected in captured.err
