"""Builds the operators' libraries when the package is installed.

setuptools runs this file by itself, without the package around it (pyproject.toml,
``[tool.setuptools.cmdclass]``), so it may import nothing of it. torch is imported only to find its
headers; without torch or a compiler the package installs without libraries, and its operators run
through torchvision's.
"""

import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

# LibTorch's stable ABI: a library built for 2.11 serves every later torch.
STABLE_ABI = "0x020b000000000000"

CPU_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    # The geometry must round as the device does; see roi_math.h.
    "-ffp-contract=off",
    "-fno-math-errno",
]


class BuildOperators(build_ext):
    """``build_ext`` that knows where torch is and what its stable ABI asks for."""

    def build_extension(self, ext: Extension) -> None:
        """Builds one library; says so and goes on where that fails."""
        try:
            import torch
        except ImportError:
            self.warn(
                f"{ext.name} is not built: torch is not importable while building. With pip, "
                "install torch first and pass --no-build-isolation"
            )
            return
        root = Path(torch.__file__).parent
        ext.include_dirs = [str(root / "include")]
        ext.library_dirs = [str(root / "lib")]
        ext.libraries = ["torch_cpu"]
        ext.define_macros = [("TORCH_TARGET_VERSION", STABLE_ABI)]
        ext.extra_compile_args = CPU_FLAGS
        if sys.platform.startswith("linux"):
            # torch is loaded before this library; the linker need not know all it depends on.
            ext.extra_link_args = ["-Wl,--allow-shlib-undefined", "-s"]
        super().build_extension(ext)
