"""Builds the operators' library when the package is installed.

setuptools runs this file without the package (pyproject.toml, ``[tool.setuptools.cmdclass]``), so
it must not import the package. torch is imported only to find its headers. Without torch or a
compiler, the package is installed without the library, and its operators run through torchvision's.

The library also has the operators for CUDA, but not their kernels: kernels.py compiles those at
first use.
"""

import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

# LibTorch's stable ABI: a library built for 2.11 works with every later torch.
STABLE_ABI = "0x020b000000000000"

# The geometry must round in the same way on host and device; see roi_math.h.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-ffp-contract=off"]
# The kernels have NVRTC's pragmas.
FLAGS += ["-Wno-unknown-pragmas"]


class BuildOperators(build_ext):
    """``build_ext`` with torch's paths and the flags for its stable ABI."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the library; without torch, warns and continues."""
        try:
            import torch
        except ImportError:
            self.warn(
                f"{ext.name} is not built: torch is not importable while building. With pip, "
                "install torch first and pass --no-build-isolation"
            )
            return
        root = Path(str(torch.__file__)).parent
        ext.include_dirs = [str(root / "include")]
        ext.library_dirs = [str(root / "lib")]
        ext.libraries = ["torch_cpu"]
        ext.define_macros = [("TORCH_TARGET_VERSION", STABLE_ABI)]
        ext.extra_compile_args = FLAGS
        if sys.platform.startswith("linux"):
            # torch is loaded before this library, so the linker may ignore missing dependencies.
            ext.extra_link_args = ["-Wl,--allow-shlib-undefined", "-s"]
        super().build_extension(ext)
