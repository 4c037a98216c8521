"""The time of each part of a model, measured by hooks on its modules."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

OTHER = "other"

# The stages of the modules of detectron2's GeneralizedRCNN. A stage excludes the stages of modules
# inside it: "proposals" is the RPN without its head, "detections" the selection of detections.
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
    """The modules of each stage of a detectron2 model, as far as the model has them.

    Modules inside a compiled module are left out, because a hook would split its graph.
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
        # A cascade's heads are a ModuleList, which is never called itself.
        parts = list(module) if isinstance(module, nn.ModuleList) else [module]
        stages.setdefault(stage, []).extend(parts)
    return stages


class StageTimer:
    """Splits time into stages that add up to the total; a stage excludes the stages inside it.

    Within ``running()``, every call of a module counts for its stage. On CUDA, events mark the
    times, so that the GPU is synchronised only once, at the end.

    Args:
        stages: the modules of each stage.
        device: the device of the modules.
    """

    def __init__(self, stages: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        self._stages = stages
        self._device = device
        self._cuda = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def running(self) -> Iterator[dict[str, float]]:
        """Measures; yields a dict that has the milliseconds of each stage afterwards.

        The stages are in the order of their first call; ``OTHER`` is the time outside all stages.
        """
        times: dict[str, float] = {}
        handles = []
        for stage, module in [(s, m) for s, modules in self._stages.items() for m in modules]:
            handles += [
                module.register_forward_pre_hook(lambda *_, stage=stage: self.begin(stage)),
                module.register_forward_hook(lambda *_: self.end(), always_call=True),
            ]
        self._open = [OTHER]
        self._marks = [(OTHER, self._now())]
        try:
            yield times
            self._marks.append(("", self._now()))
            if self._cuda:
                torch.cuda.synchronize(self._device)
            for (stage, since), (_, until) in pairwise(self._marks):
                ms = since.elapsed_time(until) if self._cuda else 1e3 * (until - since)
                times[stage] = times.get(stage, 0.0) + ms
        finally:
            self._open = []
            for handle in handles:
                handle.remove()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time of the block for a stage."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Begins a stage inside the current one; outside ``running()`` it does nothing."""
        if self._open:
            self._open.append(name)
            self._marks.append((name, self._now()))

    def end(self) -> None:
        """Ends the current stage."""
        if self._open:
            self._open.pop()
            self._marks.append((self._open[-1], self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # The model's GPU may differ from the current one.
        event.record(torch.cuda.current_stream(self._device))
        return event
