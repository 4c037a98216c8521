"""Builds the operators' libraries when the package is installed.

setuptools runs this file without the package (pyproject.toml, ``[tool.setuptools.cmdclass]``), so
it must not import the package. torch is imported only to find its headers. Without torch or a
compiler, the package is installed without libraries, and its operators run through torchvision's.

The CUDA library needs a torch that was built with CUDA, and an nvcc of the same major version. nvcc
is searched for in ``$CUDA_HOME/bin``, in ``PATH``, and in the packages of the extra ``cuda``. Those
must be installed, before the build begins, beside the torch that this build imports:

* pip: ``pip install torch "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*"`` (the version that
  torch requires), then ``pip install --no-build-isolation mask-rcnn-plus``. To name the extra in
  the second command is too late, since pip builds before it installs.
* uv builds in a separate environment: ``uv sync --extra cuda``, then the same command again with
  ``--reinstall-package mask-rcnn-plus`` and ``CUDA_HOME`` set to ``nvidia/cu13`` in the project's
  site-packages.

``TORCH_CUDA_ARCH_LIST`` names the architectures to build for, as for torch's own extensions.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from setuptools import Extension
from setuptools.command.build_ext import build_ext

# LibTorch's stable ABI: a library built for 2.11 works with every later torch.
STABLE_ABI = "0x020b000000000000"

# The geometry must round in the same way on host and device; see roi_math.h.
CODE_FLAGS = ["-fvisibility=hidden", "-ffp-contract=off"]
CPU_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", *CODE_FLAGS]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    # Compile the architectures in parallel, on all cores.
    "--threads=0",
    # torch's CUDA runtime may lack the symbolic link that a linker needs.
    "--cudart=static",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    f"-Xcompiler=-fPIC,{','.join(CODE_FLAGS)}",
    "-shared",
    "-Xlinker=-s",
]

# One of each generation that CUDA 13 supports, from T4 on. Code for one also runs on later ones of
# the same major version. A GPU that is newer than all of these uses the PTX of the last one.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
# Names that torch allows in TORCH_CUDA_ARCH_LIST instead of numbers.
FAMILIES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class Unavailable(Exception):
    """The reason why a library cannot be built here."""


class Nvcc(NamedTuple):
    """A CUDA compiler."""

    path: Path
    release: str  # "13.0"


def _output(*command: str | Path) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error


def find_nvcc(major: str) -> Nvcc:
    """The first nvcc of a major version.

    Raises:
        Unavailable: no nvcc of that version; the message names the others.
    """
    candidates = [Path(entry) / "nvidia" / f"cu{major}" / "bin" / "nvcc" for entry in sys.path]
    if on_path := shutil.which("nvcc"):
        candidates.insert(0, Path(on_path))
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(0, Path(home) / "bin" / "nvcc")
    others = []
    for path in filter(Path.is_file, candidates):
        release = re.search(r"release (\d+\.\d+)", _output(path, "--version"))
        nvcc = Nvcc(path, release[1] if release else "unknown")
        if nvcc.release.partition(".")[0] == major:
            return nvcc
        others.append(f"{path} is CUDA {nvcc.release}")
    raise Unavailable(
        f"torch was built with CUDA {major}, and no nvcc of that version was found"
        + (f" ({'; '.join(others)})" if others else "")
        + f". Set CUDA_HOME to a CUDA {major} toolkit, or see mask_rcnn_plus/ops/build.py for one "
        "from the Python registry"
    )


def capabilities(torch: ModuleType) -> list[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs; empty if a GPU does not respond."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        return [torch.cuda.get_device_capability(index) for index in range(count)]
    except RuntimeError:  # a broken GPU, or one that another process uses exclusively
        return []


def architecture_flags(
    wanted: str | None, known: set[str], present: Sequence[tuple[int, int]] = ()
) -> list[str]:
    """nvcc's flags for a list of architectures.

    Args:
        wanted: in the form of ``TORCH_CUDA_ARCH_LIST``: ``"8.0;9.0+PTX"`` or ``"Ampere;Hopper"``;
            None for the most common architectures, and older GPUs of this machine.
        known: architectures that nvcc supports, such as ``{"80", "90a"}``.
        present: compute capabilities of this machine's GPUs.

    Raises:
        Unavailable: the list contains an invalid or unsupported name.
    """
    if not (wanted and wanted.strip()):
        oldest = tuple(map(int, ARCHITECTURES[0].split(".")))
        older = [f"{gpu[0]}.{gpu[1]}" for gpu in sorted(set(present)) if gpu < oldest]
        numbers = [n for n in (*older, *ARCHITECTURES) if n.replace(".", "") in known]
        if not numbers:
            raise Unavailable(f"nvcc supports none of {', '.join(ARCHITECTURES)}")
        wanted = ";".join(numbers) + "+PTX"
    flags = []
    names = re.split(r"[;,\s]+", wanted.strip(" ;,\t\n"))
    for name in ";".join(FAMILIES.get(name, name) for name in names).split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None or match[1] + match[2] not in known:
            raise Unavailable(
                f"TORCH_CUDA_ARCH_LIST: unsupported {name!r}; expected numbers that nvcc supports, "
                f"such as '8.0;9.0+PTX', or {', '.join(FAMILIES)}"
            )
        code = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return flags


def nvcc_command(torch: ModuleType, source: Path, target: Path) -> list[str]:
    """The command that builds the CUDA library.

    Raises:
        Unavailable: torch was built without CUDA, or there is no matching nvcc.
    """
    if torch.version.cuda is None:
        raise Unavailable("torch was built without CUDA")
    if not sys.platform.startswith("linux"):
        raise Unavailable("the CUDA operators can only be built on Linux")
    nvcc = find_nvcc(torch.version.cuda.partition(".")[0])
    codes = set(re.findall(r"sm_(\w+)", _output(nvcc.path, "--list-gpu-code")))
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    home, root = nvcc.path.parents[1], Path(str(torch.__file__)).parent
    return [
        str(nvcc.path),
        *NVCC_FLAGS,
        *architecture_flags(wanted, codes, capabilities(torch)),
        f"-I{root / 'include'}",
        str(source),
        f"-o={target}",
        f"-L{root / 'lib'}",
        # The runtime of the registry's packages; a toolkit's nvcc finds its own.
        f"-L{home / 'lib'}",
        "-ltorch_cpu",
        "-ltorch_cuda",
        # torch is loaded before this library, so the linker may ignore missing dependencies.
        "-Xlinker=--allow-shlib-undefined",
    ]


class BuildOperators(build_ext):
    """``build_ext`` with torch's paths and the flags for its stable ABI."""

    def build_extension(self, ext: Extension) -> None:
        """Builds one library; if that fails, warns and continues."""
        try:
            import torch
        except ImportError:
            self.warn(
                f"{ext.name} is not built: torch is not importable while building. With pip, "
                "install torch first and pass --no-build-isolation"
            )
            return
        if ext.sources[0].endswith(".cu"):
            self.build_cuda(ext, torch)
        else:
            self.build_cpu(ext, torch)

    def build_cpu(self, ext: Extension, torch: ModuleType) -> None:
        root = Path(str(torch.__file__)).parent
        ext.include_dirs = [str(root / "include")]
        ext.library_dirs = [str(root / "lib")]
        ext.libraries = ["torch_cpu"]
        ext.define_macros = [("TORCH_TARGET_VERSION", STABLE_ABI)]
        ext.extra_compile_args = CPU_FLAGS
        if sys.platform.startswith("linux"):
            # torch is loaded before this library, so the linker may ignore missing dependencies.
            ext.extra_link_args = ["-Wl,--allow-shlib-undefined", "-s"]
        super().build_extension(ext)

    def build_cuda(self, ext: Extension, torch: ModuleType) -> None:
        # setuptools does not support CUDA sources.
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            command = nvcc_command(torch, Path(ext.sources[0]), target)
            self.announce(" ".join(command), level=2)
            process = subprocess.run(
                command,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
            if process.returncode != 0:
                raise Unavailable(f"nvcc failed:\n{process.stderr or process.stdout}")
        except Unavailable as reason:
            # Remove the library of an earlier build, which would be used instead.
            target.unlink(missing_ok=True)
            self.warn(f"{ext.name} is not built: {reason}")
