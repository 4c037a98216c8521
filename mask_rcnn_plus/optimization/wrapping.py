"""Parts of an optimised model that run in another way than by calling one layer after the other."""

import logging
from typing import Any

from torch import nn

from mask_rcnn_plus.optimization.report import OptimizationReport

logger = logging.getLogger(__name__)


class Wrapper(nn.Module):
    """A part of a model that runs in another way, and has the attributes that others ask it for.

    Hooks on it are called outside of what was compiled or captured, and see none of what is inside.
    """

    part: nn.Module

    def __init__(self, part: nn.Module, name: str, report: OptimizationReport) -> None:
        """
        Args:
            part: in evaluation mode.
            name: of the part in the model.
            report: of the model.
        """
        super().__init__()
        self.part = part
        self.name = name
        self.report = report

    def __getattr__(self, name: str) -> Any:
        # Of a backbone: its strides, channels, size_divisibility.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)

    def give_up(self, how: str, error: Exception) -> None:
        """Says, in the log and the report, that the part runs as it would, and why."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        what = f"{self.name}: without {how}, which failed ({reason})"
        logger.warning("Not optimised is %s", what)
        self.report.kept.append(what)
