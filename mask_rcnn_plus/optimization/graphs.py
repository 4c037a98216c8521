"""CUDA graphs of the layers whose shapes follow from the image's alone."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mask_rcnn_plus.optimization.report import OptimizationReport
from mask_rcnn_plus.optimization.wrapping import Wrapper

Maps = dict[str, Tensor]

DEVICE = "cuda"
# Each keeps the maps that it gives, of one size: 80 MiB at 800 x 1216 in fp32. What it computes on
# the way, about 1 GiB, it shares with the others.
MOST_GRAPHS = 4
# Of how many shapes uses are counted.
_MOST_SHAPES = 256
# Runs before a capture, in which libraries choose algorithms and allocate their workspaces.
_WARM_UPS = 3


class GraphedBackbone(Wrapper):
    """A backbone that replays its kernels as one graph for shapes that it has seen before.

    A shape is captured when it comes for the second time, while there are fewer than
    ``MOST_GRAPHS``; from then on when it has come twice as often as the least used of those, whose
    place it takes. So shapes that keep changing are not captured again and again. All other images
    run as they would. Threads and streams may share a model: replays wait for each other.

    Where a capture fails, the backbone runs as it would from then on, and the report says why.
    No GPU has run this yet.
    """

    def __init__(self, backbone: nn.Module, report: OptimizationReport) -> None:
        """
        Args:
            backbone: in evaluation mode; gives maps by name.
            report: of the model.
        """
        super().__init__(backbone, "backbone", report)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._uses: OrderedDict[Any, int] = OrderedDict()  # the shape used last is the last
        self._graphs: dict[Any, _Graph] = {}
        self._recorder: _Recorder | None = None
        self._failed = False

    def forward(self, x: Tensor) -> Maps:
        """(N, C, H, W) to maps by name."""
        if x.device.type != DEVICE or torch.is_grad_enabled() or self._failed or _is_capturing():
            return self.part(x)
        # Casts that are in a graph stay in it.
        autocast = torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE)
        key = (tuple(x.shape), x.dtype, x.device, autocast)
        with self._lock:
            if self._is_due(key):
                self._capture(key, x)
            if key in self._graphs and self._recorder is not None:
                return self._recorder.replay(self._graphs[key], x)
        return self.part(x)

    def _is_due(self, key: Any) -> bool:
        """Counts a use of a shape, and says whether it is to be captured now."""
        self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > _MOST_SHAPES:
            del self._uses[next(one for one in self._uses if one not in self._graphs)]
        if key in self._graphs or self._uses[key] < 2:
            return False
        return len(self._graphs) < MOST_GRAPHS or self._uses[key] >= 2 * self._uses[self._least()]

    def _least(self) -> Any:
        return min(self._graphs, key=self._uses.__getitem__)

    def _capture(self, key: Any, x: Tensor) -> None:
        try:
            self._recorder = self._recorder or _Recorder(x.device)
            graph = self._recorder.record(self.part, x)
        # Whatever it is: it happens again without a graph, and is raised there, or it does not.
        except Exception as error:
            self._failed, self._recorder = True, None
            self._graphs.clear()
            self.give_up("CUDA graphs", error)
            return
        # Not before: the capture has waited for the device, which may have been replaying it.
        if len(self._graphs) == MOST_GRAPHS:
            del self._graphs[self._least()]
        self._graphs[key] = graph

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_uses", "_graphs", "_recorder", "_failed")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # A graph reads the weights where they lay when it was captured.
        self._forget()
        return super()._apply(fn, recurse)


class _Graph:
    """The kernels of a call on one shape, with the memory that they read and write."""

    def __init__(self, graph: Any, source: Tensor, maps: Maps) -> None:
        self.graph, self.source, self.maps = graph, source, maps


class _Recorder:
    """Captures and replays on a device.

    Its graphs share the memory of what they compute on the way: one is replayed after the other,
    and what it gives stays its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # Memory is shared between captures on the same stream alone.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        self._last: Any = None

    def record(self, call: Callable[[Tensor], Maps], x: Tensor) -> _Graph:
        """
        Raises:
            Exception: of any kind; the stream that was current is so again.
        """
        autocast = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
        # A tensor made in inference mode could not be written outside of it. A weight that autocast
        # remembers would lie in the memory of the graph that cast it.
        with (
            torch.cuda.device(self._device),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(DEVICE, autocast[1], enabled=autocast[0], cache_enabled=False),
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
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ):
                    maps = call(source)
            finally:
                # torch leaves its own current where the end of a capture fails.
                torch.cuda.set_stream(outside)
        return _Graph(graph, source, dict(maps))

    def replay(self, graph: _Graph, x: Tensor) -> Maps:
        """What the call gives for ``x``, in memory of its own."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None:
            stream.wait_event(self._last)
        graph.source.copy_(x)
        graph.graph.replay()
        # A hundredth of what computing them takes; else the next image would overwrite them.
        maps = {name: value.clone() for name, value in graph.maps.items()}
        self._last = stream.record_event()
        return maps


def _is_capturing() -> bool:
    """Whether somebody else captures this call."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
