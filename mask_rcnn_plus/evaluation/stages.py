"""How long each part of a model takes, by hooks on its modules."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

OTHER = "other"

# Path of a module in detectron2's GeneralizedRCNN -> its stage. What runs within a module of the
# list and within none below it belongs to that module's stage alone: proposal_generator is what the
# region proposals take without the RPN's head, roi_heads what selects detections.
_STAGES = {
    "backbone": "FPN",
    "backbone.bottom_up": "backbone",
    "proposal_generator": "proposals",
    "proposal_generator.rpn_head": "RPN head",
    "roi_heads": "detections",
    "roi_heads.pooler": "box pooler",
    "roi_heads.box_pooler": "box pooler",
    "roi_heads.res5": "box head",
    "roi_heads.box_head": "box head",
    "roi_heads.box_predictor": "box head",
    "roi_heads.mask_pooler": "mask pooler",
    "roi_heads.mask_head": "mask head",
    "roi_heads.keypoint_pooler": "keypoint pooler",
    "roi_heads.keypoint_head": "keypoint head",
}


def stage_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each stage of a detectron2 model; those that it lacks are left out.

    Modules inside one that was compiled are left out too: a hook would cut it into pieces.
    """
    stages: dict[str, list[nn.Module]] = {}
    for path, stage in _STAGES.items():
        module: nn.Module | None = model
        for name in path.split("."):
            module = module._modules.get(name) if module is not None else None
        if module is None:
            continue
        if path == "backbone" and "bottom_up" not in module._modules:
            stage = "backbone"
        # A cascade's heads are a list that nobody calls as a whole.
        parts = list(module) if isinstance(module, nn.ModuleList) else [module]
        stages.setdefault(stage, []).extend(parts)
    return stages


class StageTimer:
    """Splits time into stages that add up to the whole, each without the stages within it.

    Within ``running()`` every call of a module is counted to its stage. On CUDA the marks are
    events, which wait for nobody; the GPU is waited for at the end alone.

    Args:
        stages: of each stage the modules whose calls it is.
        device: on which the modules run.
    """

    def __init__(self, stages: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        self._stages = stages
        self._device = device
        self._cuda = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def running(self) -> Iterator[dict[str, float]]:
        """Counts; what it gives holds, after its end, the milliseconds of each stage.

        The stages are in the order of their first call; what is in none is ``OTHER``.
        """
        found: dict[str, float] = {}
        handles = []
        for stage, modules in self._stages.items():
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._beginning(stage)))
                handles.append(module.register_forward_hook(self._ending, always_call=True))
        self._open = [OTHER]
        self._marks = [(OTHER, self._now())]
        try:
            yield found
            self._marks.append(("", self._now()))
            if self._cuda:
                torch.cuda.synchronize(self._device)
            for (stage, since), (_, until) in pairwise(self._marks):
                ms = since.elapsed_time(until) if self._cuda else 1e3 * (until - since)
                found[stage] = found.get(stage, 0.0) + ms
        finally:
            self._open = []
            for handle in handles:
                handle.remove()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what is done within to a stage."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Begins a stage within the running one; outside ``running()`` nothing is counted."""
        if not self._open:
            return
        self._open.append(name)
        self._marks.append((name, self._now()))

    def end(self) -> None:
        """Ends the stage that began last."""
        if not self._open:
            return
        self._open.pop()
        self._marks.append((self._open[-1], self._now()))

    def _beginning(self, stage: str) -> Any:
        def begin(module: nn.Module, inputs: Any) -> None:
            self.begin(stage)

        return begin

    def _ending(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.end()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # The model's GPU need not be the current one.
        event.record(torch.cuda.current_stream(self._device))
        return event
