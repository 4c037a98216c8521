"""Compiles the CUDA kernels at first use, with the NVRTC of torch's CUDA packages, and loads them.

One file per kernel, type and compute capability is kept in the user's cache folder. No CUDA toolkit
is needed. csrc/roi_cuda.cpp asks for the kernels and launches them. The doctor loads this file
without the package, so it imports nothing from the package.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TYPES = ("float", "double", "c10::Half", "c10::BFloat16")
# The names of all kernels, as csrc/roi_cuda_host.h asks for them.
KERNELS = tuple(
    f"roi::cuda::{name}<{type_}>"
    for names, types in (
        (("plan_rois", "rank_rois"), TYPES[:2]),
        (("average_vectors", "average_elements", "spread_vectors", "spread_elements"), TYPES),
        (("max_elements", "spread_maxima"), TYPES),
    )
    for name in names
    for type_ in types
)
_PROBE = KERNELS[0]  # every gradient in fp32, fp16 or bf16 needs it, and it compiles quickly

_CSRC = Path(__file__).with_name("csrc")
_OPTIONS = ("-std=c++20", "-default-device")
_PROGRAM = b"""
#include "roi_cuda_average.cuh"
#include "roi_cuda_average_backward.cuh"
#include "roi_cuda_max.cuh"
#include "roi_cuda_max_backward.cuh"
"""
_MESSAGE_BYTES = 2048  # kMessageBytes in csrc/roi_cuda_host.h
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

Capability = tuple[int, int]


class Unavailable(Exception):
    """The reason why the CUDA kernels cannot run."""


def why_missing(device: int | None = None) -> str | None:
    """The reason why the kernels cannot run on a CUDA device; None if they can.

    Compiles and loads one kernel. ``device``: an index, or None for the current device.
    """
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        load(_PROBE, torch.cuda.current_device() if device is None else device)
    except (Unavailable, RuntimeError, AssertionError) as reason:  # torch raises the latter two
        return " ".join(str(reason).split())
    return None


def present_capabilities() -> list[Capability]:
    """The compute capability of each GPU that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_capability(index) for index in range(count)]


def how_to_fix() -> str:
    """How to get the kernels where they are missing."""
    version = torch.version.cuda
    if version is None:
        return "install a torch with CUDA"
    suffix = "-cu12" if version.startswith("12.") else ""
    return f"run pip install 'nvidia-cuda-nvrtc{suffix}=={version}.*' or update the NVIDIA driver"


def connect(library: Path) -> None:
    """Lets the operators' library ask for kernels. This does not load the driver yet.

    Raises:
        OSError, AttributeError: it is not this version's library.
    """
    global _connect
    _connect = ctypes.CDLL(str(library)).roi_cuda_connect
    _connect(ctypes.cast(_find, ctypes.c_void_p), None, None, None)


_connect: Callable[..., object]


@ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
def _find(kernel: bytes, device: int, context: Any, message: int) -> int | None:
    """``Driver::find`` in csrc/roi_cuda_host.h."""
    try:
        function, context[0] = load(kernel.decode(), device)
        functions = (_find, _driver().cuCtxSetCurrent, _driver().cuLaunchKernel, _current_stream())
        _connect(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))
    except Exception as error:  # C++ cannot catch it
        text = f"{error}".encode()[: _MESSAGE_BYTES - 1] + b"\0"
        ctypes.memmove(message, text, len(text))
        return None
    return function


def load(kernel: str, device: int) -> tuple[int, int]:
    """The driver's handles of a kernel (CUfunction) and of a CUDA device's context (CUcontext).

    Raises:
        Unavailable: it cannot be compiled or loaded.
    """
    name, code = compiled(kernel, torch.cuda.get_device_capability(device))
    driver, context, ordinal = _driver(), ctypes.c_void_p(), ctypes.c_int()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver, driver.cuInit(0))
    _check(driver, driver.cuDeviceGet(ctypes.byref(ordinal), device))
    # torch's context. It stays, as the module does.
    _check(driver, driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal))
    _check(driver, driver.cuCtxPushCurrent_v2(context))
    # The first call may be in the capture of a CUDA graph, and a module may need memory.
    mode = ctypes.c_int(_RELAXED)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        _check(driver, driver.cuModuleLoadData(ctypes.byref(module), code))
        _check(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, name))
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    assert function.value is not None
    assert context.value is not None
    return function.value, context.value


def _current_stream() -> Any:
    library = Path(str(torch.__file__)).parent / "lib" / "libtorch_cuda.so"
    return ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"the NVIDIA driver does not load: {error}") from error


def _check(driver: ctypes.CDLL, error: int) -> None:
    if error:
        text = ctypes.c_char_p(b"unknown error")
        driver.cuGetErrorString(error, ctypes.byref(text))
        raise Unavailable(
            f"the NVIDIA driver reports error {error}: {(text.value or b'').decode()}"
        )


def compiled(kernel: str, capability: Capability) -> tuple[bytes, bytes]:
    """The name in machine code, and the machine code, of a kernel; compiled unless it is cached.

    Args:
        kernel: one of ``KERNELS``.
        capability: of the GPU. One newer than NVRTC gets PTX, which its driver compiles.

    Raises:
        Unavailable: NVRTC is missing, too old or too new for this GPU, or fails.
    """
    parts = [kernel, *map(str, nvrtc_version()), target_of(capability), *_OPTIONS]
    key = hashlib.sha256("\n".join([*parts, *sum(_sources().items(), ())]).encode()).hexdigest()
    path = None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        path = cache_folder() / key[:32]
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            name, _, code = content[32:].partition(b"\0")
            return name, code
    name, code = _compile(kernel, target_of(capability))
    content = name + b"\0" + code
    if path is not None:
        _save(path, hashlib.sha256(content).digest() + content)
    return name, code


def cache_folder() -> Path:
    """cuda in $MASK_RCNN_PLUS_CACHE, or in mask_rcnn_plus in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MASK_RCNN_PLUS_CACHE"):
        return Path(own, "cuda")
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root, "mask_rcnn_plus", "cuda").expanduser()


def _save(path: Path, content: bytes) -> None:
    """Writes a file that other processes may read, if the folder is writable."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                temporary.replace(path)
            except OSError:
                temporary.unlink()


@functools.cache
def _sources() -> dict[str, str]:
    """The files that NVRTC compiles, from name to text."""
    names = ("roi_math.h", "roi_cuda_nvrtc.h", *sorted(p.name for p in _CSRC.glob("*.cuh")))
    return {name: (_CSRC / name).read_text(encoding="utf-8") for name in names}


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The NVRTC of torch's CUDA version: of the packages that torch depends on, or the system's."""
    major = (torch.version.cuda or "none").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = Path(str(torch.__file__)).parents[1] / "nvidia"
    for path in (
        packages / f"cu{major}" / "lib" / name,
        packages / "cuda_nvrtc" / "lib" / name,
        name,
    ):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    raise Unavailable(f"{name}, the compiler that torch's CUDA packages contain, does not load")


def nvrtc_version() -> tuple[int, int]:
    """NVRTC's CUDA version.

    Raises:
        Unavailable: NVRTC is missing.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def target_of(capability: Capability) -> str:
    """NVRTC's architecture for a GPU: ``sm_90``, or ``compute_120`` for PTX for a newer GPU.

    Raises:
        Unavailable: the GPU is too old for this NVRTC, or NVRTC is missing.
    """
    count = ctypes.c_int()
    _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(known)
    wanted = capability[0] * 10 + capability[1]
    if wanted in known:
        return f"sm_{wanted}"
    older = [code for code in known if code < wanted]
    if not older:
        raise Unavailable(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} compiles for compute capability "
            f"{min(known) / 10} and later, and this GPU has {capability[0]}.{capability[1]}"
        )
    return f"compute_{max(older)}"


def _compile(kernel: str, target: str) -> tuple[bytes, bytes]:
    """The kernel's name in machine code, and the machine code (PTX for ``compute_...``)."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    names, texts = zip(*((n.encode(), t.encode()) for n, t in _sources().items()), strict=True)
    strings = ctypes.c_char_p * len(names)
    options = [option.encode() for option in (f"--gpu-architecture={target}", *_OPTIONS)]
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), _PROGRAM, b"roi.cu", len(names), strings(*texts), strings(*names)
    )
    try:
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
        arguments = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise Unavailable(f"NVRTC cannot compile {kernel} for {target}: {log}")
        name = ctypes.c_char_p()
        nvrtc.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(name))
        return name.value or b"", _read(program, "CUBIN" if target.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    """A result of NVRTC, such as ``CUBIN``."""
    size = ctypes.c_size_t()
    getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(_nvrtc(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
