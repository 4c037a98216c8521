"""``torch.compile`` of a part of a model, which runs as it is where that fails."""

from typing import Any

import torch
from torch import nn

from mask_rcnn_plus.optimization.layers import InferenceLayer
from mask_rcnn_plus.optimization.report import OptimizationReport
from mask_rcnn_plus.optimization.wrapping import Wrapper


class Compiled(Wrapper):
    """A part that torch compiles at its first call, for inputs of any size.

    Where that fails (there is no C++ compiler, or no Triton), it runs as it would from then on, and
    the report says why. A copy, and what was pickled, is compiled as well.
    """

    def __init__(self, part: nn.Module, name: str, report: OptimizationReport) -> None:
        super().__init__(part, name, report)
        layers = [layer for layer in part.modules() if isinstance(layer, InferenceLayer)]
        # torch fuses by itself what oneDNN's operators would keep from it.
        self._fused = [layer for layer in layers if layer.fused]
        for layer in self._fused:
            layer.fused = False
        self._works = True
        self._compile()

    def _compile(self) -> None:
        self._compiled = torch.compile(self._run, dynamic=True)

    def _run(self, *args: Any) -> Any:
        return self.part(*args)

    def forward(self, *args: Any) -> Any:
        """As the part's."""
        if not self._works:
            return self.part(*args)
        try:
            return self._compiled(*args)
        # A compiler may fail in any way.
        except Exception as error:
            # If that raises too, it was not the compiler.
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
