"""The build of the CUDA library: the compiler, the GPUs, and the resulting code."""

import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import setuptools
import torch

from mask_rcnn_plus.ops import build

SOURCE = Path(build.__file__).parent / "csrc" / "roi_cuda.cu"


def fake_nvcc(folder: Path, release: str) -> Path:
    """A toolkit with an nvcc for two architectures; returns its folder."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo release {release}, V1;; *) echo sm_80 sm_90a;; esac"
    )
    path.chmod(0o755)
    return folder


@pytest.fixture
def no_nvcc(monkeypatch):
    """Neither a toolkit nor the extra's packages are installed."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.sys, "path", [])


def test_cuda_home_precedes_path_precedes_python_packages(no_nvcc, tmp_path, monkeypatch):
    fake_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    assert build.find_nvcc("13").path.parents[1] == tmp_path / "nvidia" / "cu13"
    on_path = fake_nvcc(tmp_path / "system", "13.1") / "bin" / "nvcc"
    monkeypatch.setattr(build.shutil, "which", lambda name: str(on_path))
    assert build.find_nvcc("13").path == on_path
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "home", "13.2")))
    assert build.find_nvcc("13").release == "13.2"


def test_nvcc_of_another_version_is_skipped_and_named(no_nvcc, tmp_path, monkeypatch):
    home = fake_nvcc(tmp_path / "home", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(build.Unavailable, match=r"CUDA 13, .*home/bin/nvcc is CUDA 12.8"):
        build.find_nvcc("13")
    fake_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    assert build.find_nvcc("13").release == "13.0"


def test_missing_compiler_says_what_to_do(no_nvcc):
    with pytest.raises(build.Unavailable, match="Set CUDA_HOME to a CUDA 13 toolkit, or see"):
        build.find_nvcc("13")


def test_torch_without_cuda_gets_no_cuda_library():
    version = types.SimpleNamespace(cuda=None)
    with pytest.raises(build.Unavailable, match="torch was built without CUDA"):
        build.nvcc_command(types.SimpleNamespace(version=version), SOURCE, Path("target"))


@pytest.mark.parametrize(
    ("wanted", "codes"),
    [
        ("8.0;9.0+PTX", ["compute_80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("8.6 9.0", ["compute_86,code=sm_86", "compute_90,code=sm_90"]),
        ("9.0a", ["compute_90a,code=sm_90a"]),
        ("Hopper", ["90,code=sm_90", "90,code=compute_90"]),
        ("Ampere;9.0", ["80,code=sm_80", "86,code=sm_86", "86,code=compute_86", "90,code=sm_90"]),
        (None, ["80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "100,code=compute_100"]),
        ("", ["80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "100,code=compute_100"]),
    ],
)
def test_architectures(wanted, codes):
    flags = build.architecture_flags(wanted, {"80", "86", "90", "90a", "100"})
    assert len(flags) == len(codes)
    assert all(flag.endswith(code) for flag, code in zip(flags, codes, strict=True))


def test_default_covers_all_architectures_of_torch():
    flags = build.architecture_flags(None, {"75", "80", "86", "90", "100", "120"})
    built = [int(code) for code in re.findall(r"code=sm_(\d+)", " ".join(flags))]
    for code in map(int, re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "")):
        if code >= 75:  # CUDA 12 also supports older ones
            assert any(b <= code and b // 10 == code // 10 for b in built)


def test_default_includes_an_old_gpu_of_this_machine_if_nvcc_supports_it():
    present, known = [(7, 0), (6, 1), (8, 6), (7, 0)], {"61", "70", "75", "80", "86", "90"}
    flags = build.architecture_flags(None, known, present)
    codes = [re.search(r"code=(\w+)$", flag)[1] for flag in flags]
    assert codes == ["sm_61", "sm_70", "sm_75", "sm_80", "sm_90", "compute_90"]
    without = build.architecture_flags(None, known - {"61", "70"}, present)
    assert without == flags[2:]
    assert build.architecture_flags("9.0", known, present) == flags[4:5]


def test_unresponsive_gpu_does_not_fail_the_installation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, index))
    assert build.capabilities(torch) == [(7, 0), (7, 1)]

    def fails(index):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fails)
    assert build.capabilities(torch) == []


@pytest.mark.parametrize("wanted", ["Volta", "hopper", "9", "13.0", "8.0;sm_90"])
def test_unsupported_architecture_is_refused(wanted):
    with pytest.raises(build.Unavailable, match=r"TORCH_CUDA_ARCH_LIST: .* such as '8.0;9.0"):
        build.architecture_flags(wanted, {"80", "90"})


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.version.cuda and shutil.which("nvcc")), reason="no nvcc, or a torch without CUDA"
)
def test_kernels_compile_without_register_spills(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    command = build.nvcc_command(torch, SOURCE, tmp_path / "library.so")
    process = subprocess.run(
        [*command, "-Xptxas=-v", "--keep", f"--keep-dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "warning" not in process.stderr
    reports = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        process.stderr,
        re.DOTALL,
    )
    # Four dtypes each, and the two kernels that plan a gradient in fp32 and fp64.
    names = ("average_vectors", "average_elements", "spread_vectors", "spread_elements")
    names += ("max_elements", "spread_maxima")
    by_name = {name: [r for r in reports if f"{len(name)}{name}" in r[0]] for name in names}
    assert {name: len(kernels) for name, kernels in by_name.items()} == dict.fromkeys(names, 4)
    assert len(reports) == 4 * len(names) + 4
    for kernel, stack, stores, loads, registers in reports:
        print(kernel, "registers:", registers)
        assert (stack, stores, loads) == ("0", "0", "0"), kernel
    # Blocks of 256 threads share 65536 registers: kernels that wait for memory need at least three
    # blocks (two for fp64).
    for kernel, *_, registers in by_name["average_vectors"] + by_name["spread_vectors"]:
        assert int(registers) <= (128 if "vectorsId" in kernel else 80)

    # Memory is read and written 16 bytes at a time.
    (ptx,) = tmp_path.glob("*.ptx")
    for entry in ptx.read_text().split(".entry ")[1:]:
        if "_vectors" in entry.partition("(")[0]:
            assert re.search(r"ld\.global\.(v4\..32|v2\..64)", entry)
            stores = set(re.findall(r"st\.global\S*|st\.wb\S*", entry))
            assert stores
            assert all(".v4" in store for store in stores), stores


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sh", "-c", "echo broken >&2; exit 1"], "not built: nvcc failed:\nbroken"),
        (None, "no CUDA"),
    ],
)
def test_failed_build_warns_and_continues(tmp_path, monkeypatch, command, message):
    def nvcc_command(*arguments):
        if command is None:
            raise build.Unavailable("no CUDA")
        return command

    monkeypatch.setattr(build, "nvcc_command", nvcc_command)
    extension = setuptools.Extension("package._roi_cuda", ["package/roi_cuda.cu"])
    builder = build.BuildOperators(setuptools.Distribution({"ext_modules": [extension]}))
    builder.build_lib = str(tmp_path)
    builder.ensure_finalized()
    warnings = []
    monkeypatch.setattr(builder, "warn", warnings.append)
    old = Path(builder.get_ext_fullpath(extension.name))
    old.parent.mkdir()
    old.touch()
    builder.build_extension(extension)
    assert message in warnings[0]
    assert not old.exists()
