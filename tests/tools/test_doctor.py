"""mask-rcnn-plus doctor, on this machine and on simulated ones."""

import json
import os
import re
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
from mask_rcnn_tools.doctor.command import machine_facts
from mask_rcnn_tools.doctor.diagnosis import diagnose
from mask_rcnn_tools.doctor.report import format_report

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str, root: Path = ROOT) -> tuple[int, dict[str, Any]]:
    """Runs the command in a new process; the modules in ``folder`` replace installed ones."""
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
    """The report for this machine."""
    path = tmp_path_factory.mktemp("doctor") / "doctor.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes_root))
        assert main(["doctor", "--json", str(path), "--output", str(path.parent / "new")]) == 0
    return json.loads(path.read_text())


def test_a_working_installation_is_healthy(report: dict[str, Any]) -> None:
    assert report["healthy"] and report["broken"] == []
    assert report["torch"]["version"] == torch.__version__
    assert report["detectron2"]["patches"] == apply()
    assert report["detectron2"]["origin"] in ("upstream 0.6", "source", "redistribution")
    assert report["operators"]["backend"]["cpu"] == ops.backend("cpu")
    assert report["machine"]["output"]["free"] > 0 and report["machine"]["output"]["writable"]
    sets = report["datasets"]["by folder"]
    assert {"shapes_train", "shapes_val"} <= sets.keys()
    assert sets["shapes_train"]["entries"] > 0


@pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="needs a folder where not even root can create files"
)
def test_an_output_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = list(tmp_path.iterdir())
    for folder, writable in (
        (tmp_path / "new" / "deep", True),
        (tmp_path / "file", False),
        (tmp_path / "file" / "output", False),
        (Path("/proc/output"), False),
    ):
        assert machine_facts(folder)["output"]["writable"] is writable, folder
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


def test_the_report_shows_every_section(report: dict[str, Any]) -> None:
    shown = format_report(report)
    for text in (
        torch.__version__,
        "pycocotools",
        "layers",
        "roi_warp max",
        "shapes_val",
        "/dev/shm",
    ):
        assert text in shown
    assert format_report({**report, "advice": []}).splitlines()[-1] == "healthy"
    # Some read only the last line.
    advised = format_report({**report, "advice": ["install a compiler"]})
    assert "the advice above" in advised.splitlines()[-1]
    broken = {**report, "broken": ["a part: it fails"], "self_test": {"error": "ends"}}
    shown = format_report(broken)
    assert "1 part is broken" in shown and "  - a part: it fails" in shown


@pytest.fixture(scope="module")
def corrupt_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with a corrupt compiled library."""
    root = tmp_path_factory.mktemp("copy")
    plugin = root / "mask_rcnn_plus"
    ignored = shutil.ignore_patterns("*.so", "csrc")
    shutil.copytree(ROOT / "mask_rcnn_plus", plugin, ignore=ignored)
    shutil.copytree(ROOT / "mask_rcnn_tools", root / "mask_rcnn_tools")
    (plugin / "ops" / "_roi_cpu.abi3.so").write_bytes(b"\x7fELF not a library")
    return root


@pytest.mark.slow
def test_detectron2_a_library_and_the_operators_may_be_broken(
    tmp_path: Path, corrupt_copy: Path
) -> None:
    (tmp_path / "detectron2").mkdir()
    broken_detectron2 = "raise ImportError('built for another torch')"
    (tmp_path / "detectron2" / "__init__.py").write_text(broken_detectron2)
    # This library crashes its process.
    (tmp_path / "cv2.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    code, report = run(tmp_path, root=corrupt_copy)
    assert code == 1 and not report["healthy"]
    broken = "\n".join(report["broken"])
    assert "a library: ends the process by SIGSEGV" in broken
    assert "_roi_cpu.abi3.so does not load" in broken and "reinstall mask-rcnn-plus" in broken
    assert "detectron2 (a source tree): ImportError: built for another torch" in broken
    assert report["detectron2"]["origin"]  # known without an import
    assert report["operators"]["backend"]["cpu"] == "torchvision"
    # The plugin does not import, so the operators are not tested; both have one reason, one line.
    assert "mask_rcnn_plus: ImportError: built for another torch" in broken
    assert "self-test" not in broken
    shown = format_report(report)
    assert re.search(r"not run +ImportError: built for another torch", shown)
    assert "mask_rcnn_plus does not import" in shown


@pytest.mark.slow
def test_a_corrupt_library_leaves_torchvisions_operators(
    tmp_path: Path, corrupt_copy: Path
) -> None:
    code, report = run(tmp_path, root=corrupt_copy)
    assert code == 1
    assert "_roi_cpu.abi3.so does not load" in "\n".join(report["broken"])
    assert report["operators"]["backend"]["cpu"] == "torchvision"
    assert report["self_test"]["results"]
    assert all(result["ok"] for result in report["self_test"]["results"])
    assert report["package"]["folder"] == str(corrupt_copy / "mask_rcnn_plus")


@pytest.mark.slow
def test_torch_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    code, report = run(tmp_path)
    assert code == 1
    assert any("install torch" in sentence for sentence in report["broken"])
    lines = [line.split() for line in format_report(report).splitlines()]
    assert ["torch", "does", "not", "import"] in lines


def test_a_probe_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_TIMEOUT", 0)
    monkeypatch.setattr(probes, "PROBES", {"libraries": probes.probe_libraries})
    names: list[str] = []
    facts = probes.run_probes(names.append)
    assert names == ["libraries"]
    assert facts["libraries"]["error"] == "does not end within 0 seconds"


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = ops.roi_align
    monkeypatch.setattr(ops, "roi_align", lambda *args: correct(*args) * 1.01)
    wrong = [result["operator"] for result in self_test.run("cpu") if not result["ok"]]
    assert len(wrong) == 4 and all(name.startswith("roi_align") for name in wrong)
    broken = probes.probe_self_test()["broken"]
    assert sum("is wrong: forward off by" in sentence for sentence in broken) == 4

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(ops, "roi_pool", fail)
    assert any("no kernel image" in sentence for sentence in probes.probe_self_test()["broken"])


def test_a_torch_for_other_gpus() -> None:
    assert probes.supports(["sm_80"], 8, 6) and not probes.supports(["sm_80"], 9, 0)
    assert probes.supports(["sm_80", "compute_80"], 9, 0) and not probes.supports(["sm_86"], 8, 0)
    assert probes.supports(["sm_90a", "sm_120"], 12, 0)


def test_gpus_whose_kernels_do_not_compile_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    original = probes.load_file

    def load_file(name: str) -> Any:
        module = original(name)
        if name == "ops/kernels.py":
            reasons = {0: None, 1: "libnvrtc.so.13 does not load"}
            module.why_missing = lambda device=None: reasons[device]
            module.how_to_fix = lambda: "run pip"
        return module

    monkeypatch.setattr(probes, "load_file", load_file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    facts = probes.probe_operators()
    if ops.backend("cpu") != "native":
        pytest.skip("no compiled operators")
    assert facts["backend"] == {"cpu": "native", "cuda:0": "native", "cuda:1": "torchvision"}
    assert not facts["broken"]
    (sentence,) = (s for s in facts["advice"] if "cuda" in s)
    assert "cuda:1" in sentence and "libnvrtc.so.13" in sentence and "run pip" in sentence


def test_compile_fills_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASK_RCNN_PLUS_CACHE", str(tmp_path))
    kernels = probes.load_file("ops/kernels.py")
    monkeypatch.setattr(kernels, "KERNELS", kernels.KERNELS[2:3])  # it compiles quickly
    monkeypatch.setattr("mask_rcnn_tools.doctor.command.load_file", lambda name: kernels)
    try:
        kernels.nvrtc_version()
    except kernels.Unavailable as reason:
        assert main(["doctor", "--compile", "9.0"]) == 2
        assert str(reason) in capsys.readouterr().err
        return
    assert main(["doctor", "--compile", "9.0", "8.0"]) == 0
    assert len(list((tmp_path / "cuda").iterdir())) == 2
    assert "capability 8.0" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "present_capabilities", list)
    assert main(["doctor", "--compile"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert main(["doctor", "--compile", "3.0"]) == 2
    assert "this GPU has 3.0" in capsys.readouterr().err


def test_a_limited_instruction_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.backend("cpu") != "native":
        pytest.skip("no compiled operators")

    def advice_for(instruction_set: str) -> str:
        monkeypatch.setenv("MASK_RCNN_PLUS_CPU_ISA", instruction_set)
        return "\n".join(probes.probe_operators()["advice"])

    used = torch.ops.mask_rcnn_plus.cpu_isa()
    assert f"'avx1024', but the operators use {used}" in advice_for("avx1024")
    assert f"limits the operators to {used}" in advice_for(used)


def advice(report: dict[str, Any], **machine: Any) -> str:
    """The advice for an idle machine with these changes."""
    idle = {
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
    broken, sentences = diagnose({**facts, "machine": {**idle, **machine}})
    assert not broken
    return "\n".join(sentences)


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
    read_only = {**full, "writable": False}
    assert "cannot write into '/output'" in advice(report, output=read_only)
    missing = {"folder": "/datasets", "exists": False, "free": 1, "variable": False}
    assert "DETECTRON2_DATASETS" in advice(report, datasets=missing)
    assert "datasets/README.md" in advice({**report, "datasets": {"by folder": {}, "builtin": []}})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--json", "nowhere/doctor.json"], "a folder that exists"),
        (["--json", __file__], "--overwrite"),
        (["--jsn", "x"], "unrecognized arguments"),
        (["--compile", "sm_90"], "such as 9.0"),
    ],
)
def test_a_wrong_argument_gives_a_one_line_error(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and expected in captured.err
