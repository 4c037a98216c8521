"""CUDA graphs of the layers whose shapes follow from the image's alone."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# Each keeps the maps of one size: about 1 GiB at 800 x 1216 in fp32.
MOST_GRAPHS = 4
# Runs before a capture, in which libraries choose algorithms and allocate their workspaces.
_WARM_UPS = 3


class GraphedBackbone(nn.Module):
    """A backbone that replays its kernels as one graph for shapes that it has seen before.

    The second image of a shape is captured, the ``MOST_GRAPHS`` shapes used last are kept; all
    other images run as they would. What a replay returns is overwritten by the next of that shape.
    No GPU has run this yet.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """
        Args:
            backbone: in evaluation mode; gives maps by name.
        """
        super().__init__()
        self.backbone = backbone
        self._seen: set[tuple[Any, ...]] = set()
        self._graphs: OrderedDict[tuple[Any, ...], tuple[Any, Tensor, Any]] = OrderedDict()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) to maps by name."""
        key = (tuple(x.shape), x.dtype, x.device)
        if x.device.type != "cuda" or torch.is_grad_enabled():
            return self.backbone(x)
        if key not in self._seen:
            self._seen.add(key)
            return self.backbone(x)
        if key not in self._graphs:
            self._graphs[key] = self._capture(x)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, source, maps = self._graphs[key]
        source.copy_(x)
        graph.replay()
        return maps

    def _capture(self, x: Tensor) -> tuple[Any, Tensor, dict[str, Tensor]]:
        source = x.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.backbone(source)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            maps = self.backbone(source)
        return graph, source, maps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": set(), "_graphs": OrderedDict()}

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # A graph reads the weights where they lay when it was captured.
        self._seen, self._graphs = set(), OrderedDict()
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # What others ask a backbone for: its strides, channels, size_divisibility.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)
