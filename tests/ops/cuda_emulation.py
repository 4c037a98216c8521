"""Calls the CUDA kernels on the CPU (cuda_emulation.h), on guarded memory."""

import ctypes
import math
import mmap
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "mask_rcnn_plus" / "ops" / "csrc"
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# NaN as fp16, and above 10^38 as other dtypes: reveals values that were not written or are outside.
POISON = 0x7F
GUARD = 64
PROT_NONE = 0


def compile_library(name: str, folder: Path, *flags: str) -> Path:
    """Compiles a file beside this one with the host's compiler; returns the library's path."""
    path = folder / f"{name}.so"
    include = Path(torch.__file__).parent / "include"
    source = Path(__file__).with_name(f"{name}.cpp")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    code = [
        "-std=c++20",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-fvisibility=hidden",
    ]
    folders = [f"-I{source.parent}", f"-I{CSRC}", f"-isystem{include}"]
    command = ["g++", *code, *warnings, *folders, str(source), "-o", str(path), *flags]
    subprocess.run(command, check=True)
    return path


def load_operators(folder: Path) -> None:
    """Compiles the CUDA operators for the CPU and loads them.

    They are ``torch.ops.mask_rcnn_plus_emulated``.
    """
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-ltorch_cpu"]
    flags += [f"-L{Path(torch.__file__).parent / 'lib'}"]
    torch.ops.load_library(compile_library("cuda_emulation_operators", folder, *flags))


def compile_kernels(folder: Path) -> ctypes.CDLL:
    """Compiles the kernels with the host's compiler; returns the library."""
    return load_kernels(compile_library("cuda_emulation", folder))


def load_kernels(path: Path) -> ctypes.CDLL:
    """A library that ``compile_library`` made of cuda_emulation.cpp."""
    library = ctypes.CDLL(str(path))
    library.new_call.restype = ctypes.c_void_p
    library.plan_bytes.restype = ctypes.c_int64
    library.parameter_sizes.restype = ctypes.POINTER(ctypes.c_int)
    for name in ("average", "average_backward", "maximum", "maximum_backward"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


class Guarded:
    """A dense tensor (N, C, H, W) filled with poison.

    The memory after it must not be read, and the bytes before it must not be changed.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False):
        n, c, h, w = shape
        size = n * c * h * w * dtype.itemsize
        pages = math.ceil((size + GUARD) / mmap.PAGESIZE) * mmap.PAGESIZE
        whole = torch.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), dtype=torch.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        beyond = ctypes.c_void_p(whole.data_ptr() + pages)
        assert libc.mprotect(beyond, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
        self.edge = whole[: pages - size].fill_(POISON)
        flat = whole[pages - size : pages].fill_(POISON).view(dtype)
        if channels_last:
            self.tensor = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            self.tensor = flat.view(n, c, h, w)

    def is_intact(self) -> bool:
        return bool((self.edge == POISON).all())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operator."""

    sizes: Sequence[Sequence[int]]
    boxes: Tensor
    bins: tuple[int, int]
    ratio: int
    grid: int
    channels_last: bool
    scales: Sequence[float] = (0.25, 0.125)

    def out_shape(self) -> tuple[int, int, int, int]:
        return len(self.boxes), self.sizes[0][1], *self.bins


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _typed_boxes(case: Case, dtype: torch.dtype) -> Tensor:
    """The boxes as the kernels for maps of this dtype read them."""
    return case.boxes.double() if dtype == torch.float64 else case.boxes


def copy_guarded(tensor: Tensor, dtype: torch.dtype, channels_last: bool) -> Guarded:
    copy = Guarded(tensor.shape, dtype, channels_last)
    copy.tensor.copy_(tensor)
    return copy


class Kernels:
    """The operators' kernels, and the plain definition of each (``plain_*``, on fp64 tensors).

    Tensors are dense, maps and outputs in the case's layout.
    """

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def average(self, case: Case, maps: Sequence[Tensor], seed: int) -> Tensor:
        given = [copy_guarded(m, m.dtype, case.channels_last) for m in maps]
        boxes = _typed_boxes(case, maps[0].dtype)
        out = Guarded(case.out_shape(), maps[0].dtype, case.channels_last)
        arguments = (_pointers([g.tensor for g in given]), _pointer(boxes))
        self._run("average", case, maps[0].dtype, seed, *arguments, _pointer(out.tensor))
        assert out.is_intact()
        return out.tensor

    def average_backward(
        self, case: Case, grad: Tensor, grad_channels_last: bool, seed: int
    ) -> list[Tensor]:
        given = copy_guarded(grad, grad.dtype, grad_channels_last)
        arguments = (_pointer(given.tensor), ctypes.c_bool(grad_channels_last))
        return self._gather("average_backward", case, grad.dtype, seed, *arguments)

    def maximum(self, case: Case, maps: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        given = [copy_guarded(m, m.dtype, case.channels_last) for m in maps]
        boxes = _typed_boxes(case, maps[0].dtype)
        out = Guarded(case.out_shape(), maps[0].dtype, case.channels_last)
        index = Guarded(case.out_shape(), torch.int32, case.channels_last)
        arguments = (_pointers([g.tensor for g in given]), _pointer(boxes))
        arguments += (_pointer(out.tensor), _pointer(index.tensor))
        self._run("maximum", case, maps[0].dtype, seed, *arguments)
        assert out.is_intact()
        assert index.is_intact()
        return out.tensor, index.tensor

    def maximum_backward(
        self, case: Case, grad: Tensor, grad_channels_last: bool, index: Tensor, seed: int
    ) -> list[Tensor]:
        given = copy_guarded(grad, grad.dtype, grad_channels_last)
        points = copy_guarded(index, torch.int32, case.channels_last)
        arguments = (_pointer(given.tensor), ctypes.c_bool(grad_channels_last))
        arguments += (_pointer(points.tensor),)
        return self._gather("maximum_backward", case, grad.dtype, seed, *arguments)

    def plain_average(self, case: Case, maps: Sequence[Tensor]) -> Tensor:
        given = [copy_guarded(m, torch.float64, case.channels_last).tensor for m in maps]
        out = Guarded(case.out_shape(), torch.float64, case.channels_last).tensor.fill_(torch.nan)
        self._define("plain_average", case, maps[0].dtype, _pointers(given), _pointer(out))
        return out

    def plain_average_backward(self, case: Case, grad: Tensor) -> list[Tensor]:
        given = copy_guarded(grad, torch.float64, False).tensor
        maps = [Guarded(s, torch.float64, case.channels_last).tensor.zero_() for s in case.sizes]
        arguments = (_pointer(given), ctypes.c_bool(False), _pointers(maps))
        self._define("plain_average_backward", case, grad.dtype, *arguments)
        return maps

    def plain_maximum(self, case: Case, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """In fp64 for fp64 maps, else in fp32: rounding decides which points are equal."""
        dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
        given = [copy_guarded(m, dtype, case.channels_last).tensor for m in maps]
        out = Guarded(case.out_shape(), dtype, case.channels_last).tensor.fill_(torch.nan)
        index = Guarded(case.out_shape(), torch.int32, case.channels_last).tensor.fill_(-1)
        arguments = (_pointers(given), _pointer(out), _pointer(index))
        self._define("plain_maximum", case, dtype, *arguments)
        return out, index

    def plain_maximum_backward(self, case: Case, grad: Tensor, index: Tensor) -> list[Tensor]:
        given = copy_guarded(grad, torch.float64, False).tensor
        points = copy_guarded(index, torch.int32, case.channels_last).tensor
        maps = [Guarded(s, torch.float64, case.channels_last).tensor.zero_() for s in case.sizes]
        arguments = (_pointer(given), ctypes.c_bool(False), _pointer(points), _pointers(maps))
        self._define("plain_maximum_backward", case, grad.dtype, *arguments)
        return maps

    def axes_beyond_tables(self, case: Case) -> int:
        """The number of axes with a bin that has more taps than the forward tables can hold."""
        return self._call("axes_beyond_tables", case, _pointer(case.boxes))

    def _gather(
        self, name: str, case: Case, dtype: torch.dtype, seed: int, *arguments: object
    ) -> list[Tensor]:
        maps = [Guarded(s, dtype, case.channels_last) for s in case.sizes]
        plan = self._call("plan_bytes", case)
        # A multiple of 16 bytes, so that it starts at an address that is one too.
        memory = Guarded((1, 1, math.ceil(plan / 16), 16), torch.uint8)
        boxes = _typed_boxes(case, dtype)
        arguments += (_pointer(boxes), _pointer(memory.tensor))
        self._run(name, case, dtype, seed, *arguments, _pointers([m.tensor for m in maps]))
        assert all(m.is_intact() for m in maps)
        assert memory.is_intact()
        return [m.tensor for m in maps]

    def _define(self, name: str, case: Case, dtype: torch.dtype, *arguments: object) -> None:
        boxes = _typed_boxes(case, dtype)
        fp64 = ctypes.c_bool(boxes.dtype == torch.float64)
        self._call(name, case, fp64, _pointer(boxes), *arguments)

    def _run(
        self, name: str, case: Case, dtype: torch.dtype, seed: int, *arguments: object
    ) -> None:
        message = self._call(name, case, TYPES[dtype], ctypes.c_uint64(seed), *arguments)
        if message:
            raise RuntimeError(message.decode())

    def _call(self, name: str, case: Case, *arguments: object) -> object:
        sizes = [size for shape in case.sizes for size in shape]
        call = ctypes.c_void_p(
            self.library.new_call(
                len(case.sizes),
                (ctypes.c_int64 * len(sizes))(*sizes),
                (ctypes.c_float * len(case.sizes))(*case.scales),
                2,
                ctypes.c_float(60),
                3,
                *case.bins,
                case.ratio,
                case.grid,
                ctypes.c_int64(len(case.boxes)),
                ctypes.c_bool(case.channels_last),
            )
        )
        try:
            return getattr(self.library, name)(call, *arguments)
        finally:
            self.library.delete_call(call)
