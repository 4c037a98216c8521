"""Parts of an optimized model that torch compiles, or that CUDA graphs replay."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mask_rcnn_plus.errors import reason
from mask_rcnn_plus.optimization.layers import InferenceLayer
from mask_rcnn_plus.optimization.model import OptimizationReport

logger = logging.getLogger(__name__)

Maps = dict[str, Tensor]

DEVICE = "cuda"
# Each graph keeps its result maps for one size: 80 MiB at 800 x 1216 in fp32. The graphs share the
# memory of intermediate results, about 1 GiB.
MAX_GRAPHS = 4
# The number of shapes whose uses are counted.
_MAX_SHAPES = 256
# Runs before a capture, in which libraries choose algorithms and allocate their workspaces.
_WARM_UPS = 3


class Wrapper(nn.Module):
    """A part of a model that runs in another way, with the attributes of the part.

    Hooks on it are called outside of what is compiled or captured, and see nothing inside.
    """

    part: nn.Module

    def __init__(self, part: nn.Module, *, name: str, report: OptimizationReport) -> None:
        """``part`` is in evaluation mode; ``name`` is its name in the model of ``report``."""
        super().__init__()
        self.part = part
        self.name = name
        self.report = report

    def __getattr__(self, name: str) -> Any:
        # A model reads attributes of its parts, such as a backbone's size_divisibility.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)

    def give_up(self, method: str, error: Exception) -> None:
        """Records, in the log and the report, why the part runs without ``method``."""
        failure = f"{type(error).__name__}: {reason(error)}"
        text = f"{self.name}: without {method}, which failed ({failure})"
        logger.warning("Not optimized: %s", text)
        self.report.kept.append(text)


class Compiled(Wrapper):
    """A part that torch compiles at its first call, for inputs of any size.

    If that fails (no C++ compiler, or no Triton), the part runs uncompiled from then on, and the
    report says why. Copies and unpickled ones compile again.
    """

    def __init__(self, part: nn.Module, *, name: str, report: OptimizationReport) -> None:
        """Arguments as for :class:`Wrapper`."""
        super().__init__(part, name=name, report=report)
        # torch cannot fuse across oneDNN's operators, and fuses by itself without them.
        self._fused = [m for m in part.modules() if isinstance(m, InferenceLayer) and m.fused]
        for layer in self._fused:
            layer.fused = False
        self._works = True
        self._compile()

    def _compile(self) -> None:
        self._compiled = torch.compile(self._run, dynamic=True)

    def _run(self, *args: Any) -> Any:
        return self.part(*args)

    def forward(self, *args: Any) -> Any:
        """Calls the part with the same arguments."""
        if not self._works:
            return self.part(*args)
        try:
            return self._compiled(*args)
        # A compiler may raise any exception.
        except Exception as error:
            # If this raises too, the compiler was not the cause.
            result = self.part(*args)
            self._works = False
            for layer in self._fused:
                layer.fused = True
            self.give_up("torch.compile", error)
            return result

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()


class GraphedBackbone(Wrapper):
    """A backbone that replays its kernels as one CUDA graph for input shapes that repeat.

    A shape is captured at its second use while there are fewer than ``MAX_GRAPHS`` graphs. After
    that, a shape replaces the least used graph once it has been used twice as often, so shapes that
    keep changing are not captured again and again. All other images run without a graph. Threads
    and streams may share a model: replays wait for each other.

    If a capture fails, the backbone runs without graphs from then on, and the report says why.
    No GPU has run this yet.
    """

    def __init__(self, backbone: nn.Module, *, report: OptimizationReport) -> None:
        """``backbone`` is in evaluation mode and returns maps by name."""
        super().__init__(backbone, name="backbone", report=report)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[Any, int] = {}  # in the order of the last use
        self._graphs: dict[Any, _Graph] = {}
        self._recorder: _Recorder | None = None
        self._failed = False

    def forward(self, x: Tensor) -> Maps:
        """(N, C, H, W) to maps by name."""
        if x.device.type != DEVICE or torch.is_grad_enabled() or self._failed or _is_capturing():
            return self.part(x)
        # A graph contains the casts of its capture.
        autocast = torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE)
        key = (tuple(x.shape), x.dtype, x.device, autocast)
        with self._lock:
            if self._is_due(key):
                self._capture(key, x)
            if self._recorder is not None and key in self._graphs:
                return self._recorder.replay(self._graphs[key], x)
        return self.part(x)

    def _is_due(self, key: Any) -> bool:
        """Counts a use of a shape; returns whether to capture it now."""
        self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > _MAX_SHAPES:
            del self._uses[next(shape for shape in self._uses if shape not in self._graphs)]
        if key in self._graphs or self._uses[key] < 2:
            return False
        is_full = len(self._graphs) == MAX_GRAPHS
        return not is_full or self._uses[key] >= 2 * self._uses[self._least_used()]

    def _least_used(self) -> Any:
        return min(self._graphs, key=self._uses.__getitem__)

    def _capture(self, key: Any, x: Tensor) -> None:
        try:
            self._recorder = self._recorder or _Recorder(x.device)
            graph = self._recorder.record(self.part, x)
        # Any exception: if the part itself raises it, it does so again without a graph.
        except Exception as error:
            self._failed, self._recorder = True, None
            self._graphs.clear()
            self.give_up("CUDA graphs", error)
            return
        # Only now: the device may have been replaying the old graph, and the capture waited for it.
        if len(self._graphs) == MAX_GRAPHS:
            del self._graphs[self._least_used()]
        self._graphs[key] = graph

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_uses", "_graphs", "_recorder", "_failed")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # A graph reads the weights at their addresses during the capture.
        self._forget()
        return super()._apply(fn, recurse)


@dataclass
class _Graph:
    """The kernels for one shape, with the tensors that they read (source) and write (maps)."""

    graph: Any
    source: Tensor
    maps: Maps


class _Recorder:
    """Captures and replays on one device.

    Its graphs are replayed one after the other, so they share the memory of intermediate results.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # Only captures on the same stream share memory.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        self._last: Any = None

    def record(self, call: Callable[[Tensor], Maps], x: Tensor) -> _Graph:
        """Captures ``call(x)``. It may raise any exception; the current stream is restored."""
        enabled, dtype = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
        # Tensors made in inference mode cannot be written outside it. Weights in autocast's cache
        # would live in the memory of the graph that cast them.
        with (
            torch.cuda.device(self._device),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(DEVICE, dtype, enabled=enabled, cache_enabled=False),
        ):
            source, outside = x.clone(), torch.cuda.current_stream()
            side = torch.cuda.Stream(self._device)
            side.wait_stream(outside)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    call(source)
            outside.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use the device during the capture.
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ):
                    maps = call(source)
            finally:
                # If the end of a capture fails, torch leaves its own stream current.
                torch.cuda.set_stream(outside)
        return _Graph(graph, source, dict(maps))

    def replay(self, graph: _Graph, x: Tensor) -> Maps:
        """The result for ``x``, as new tensors."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None:
            stream.wait_event(self._last)
        graph.source.copy_(x)
        graph.graph.replay()
        # The next replay overwrites the maps. A copy takes a hundredth of the time to compute them.
        maps = {name: value.clone() for name, value in graph.maps.items()}
        self._last = stream.record_event()
        return maps


def _is_capturing() -> bool:
    """Whether the caller captures this call."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
