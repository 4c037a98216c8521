"""Parts of an optimized model that torch compiles, or that CUDA graphs replay."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.optimization.layers import InferenceLayer
from mask_rcnn_plus.optimization.model import OptimizationReport

logger = logging.getLogger(__name__)

Maps = dict[str, Tensor]

DEVICE = "cuda"
# Each graph keeps the memory of its result maps and intermediate ones, about 1 GiB at 800 x 1216.
MAX_GRAPHS = 4


class Wrapper(nn.Module):
    """A part of a model that runs in another way, with the attributes of the part.

    Hooks on it are called outside of what is compiled or captured, and see nothing inside.
    """

    part: nn.Module

    def __init__(self, part: nn.Module) -> None:
        """``part`` is in evaluation mode."""
        super().__init__()
        self.part = part

    def __getattr__(self, name: str) -> Any:
        # A model reads attributes of its parts, such as a backbone's size_divisibility.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)


class Compiled(Wrapper):
    """A part that torch compiles at its first call, for inputs of any size.

    If that fails (no C++ compiler, or no Triton), the part runs uncompiled from then on, and the
    report says why. Copies and unpickled ones compile again.
    """

    def __init__(self, part: nn.Module, *, name: str, report: OptimizationReport) -> None:
        """``part`` is in evaluation mode; ``name`` is its name in the model of ``report``."""
        super().__init__(part)
        self.name, self.report = name, report
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
            failure = f"{type(error).__name__}: {reason(error)}"
            text = f"{self.name}: without torch.compile, which failed ({failure})"
            logger.warning("Not optimized: %s", text)
            self.report.kept.append(text)
            return result

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()


class GraphedBackbone(Wrapper):
    """A backbone whose kernels are replayed as a CUDA graph for input shapes that repeat.

    A shape is captured at its second use, until there are ``MAX_GRAPHS`` graphs. All other images
    run without a graph. Threads and streams may share a model.

    No GPU has run this: docs/performance.md says what is tested without one.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """``backbone`` is in evaluation mode and returns maps by name."""
        super().__init__(backbone)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Callable[[Tensor], Maps]] = {}

    def forward(self, x: Tensor) -> Maps:
        """(N, C, H, W) to maps by name.

        Raises:
            UserError: the backbone cannot be captured.
        """
        if x.device.type != DEVICE or torch.is_grad_enabled():
            return self.part(x)
        # A graph contains the casts of its capture; its tensors belong to one stream.
        autocast = torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE)
        key = (x.shape, x.dtype, autocast, torch.cuda.current_stream(x.device))
        with self._lock:
            if key in self._seen and key not in self._graphs and len(self._graphs) < MAX_GRAPHS:
                self._graphs[key] = self._capture(x)
            self._seen.add(key)
            if key in self._graphs:
                # The next replay overwrites the graph's own maps.
                return {name: value.clone() for name, value in self._graphs[key](x).items()}
        return self.part(x)

    def _capture(self, x: Tensor) -> Callable[[Tensor], Maps]:
        enabled, dtype = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
        # Tensors made in inference mode cannot be written outside it. Weights in autocast's cache
        # would live in the memory of the graph that cast them.
        with (
            torch.cuda.device(x.device),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(DEVICE, dtype, enabled=enabled, cache_enabled=False),
        ):
            try:
                # Not the module itself, since torch refuses modules with hooks.
                return torch.cuda.make_graphed_callables(self.part.__call__, (x.clone(),))
            except RuntimeError as error:
                raise UserError(
                    f"cannot capture the backbone as a CUDA graph ({reason(error)}); run without: "
                    "TEST.OPTIMIZE.CUDA_GRAPHS False, or optimize(model, cuda_graphs=False)"
                ) from error

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_seen", "_graphs")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # A graph reads the weights at their addresses during the capture.
        self._forget()
        return super()._apply(fn, recurse)
