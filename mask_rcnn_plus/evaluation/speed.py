"""The time of each stage of an evaluation, over all processes, and its peak memory."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate


@dataclass(frozen=True)
class InferenceSpeed:
    """The speed of an evaluation, over all processes, without the first few batches.

    Times in ms are milliseconds per image, in the process that handles the image.

    Attributes:
        images: the number of measured images.
        seconds: wall time of the slowest process, from loading to the evaluator, without the final
            scoring.
        images_per_second: images / seconds.
        data_ms: waiting for the loader.
        inference_ms: the network.
        inference_stages_ms: the known parts of ``inference_ms`` by name.
        postprocessing_ms: rescaling boxes and dropping empty ones; None if the model does this, and
            pastes masks, within the inference.
        evaluation_ms: the evaluator, which pastes and encodes masks, and the final scoring.
        peak_memory_mib: the largest of all processes, in MiB; nan if unknown.
        peak_memory_kind: what ``peak_memory_mib`` measures.
        processes: the number of processes that shared the images.
        device: the model's device, with its name.
    """

    images: int
    seconds: float
    images_per_second: float
    data_ms: float
    inference_ms: float
    postprocessing_ms: float | None
    evaluation_ms: float
    peak_memory_mib: float
    peak_memory_kind: str
    processes: int
    device: str
    inference_stages_ms: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, ready for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A table of the stages, then the rate and the memory."""
        stages = {
            "data": self.data_ms,
            "inference": self.inference_ms,
            "post-processing": self.postprocessing_ms,
            "evaluation": self.evaluation_ms,
        }
        total = sum(value for value in stages.values() if value is not None)
        rows = []
        for name, value in stages.items():
            rows.append((name, "in inference", "") if value is None else _row(name, value, total))
            if name == "inference":
                parts = self.inference_stages_ms.items()
                rows += [_row(f"- {part}", ms, total) for part, ms in parts]
        rows.append(("all", f"{total:.1f} ms", ""))
        headers, align = ("stage", "per image", "share"), ("left", "right", "right")
        times = tabulate(rows, headers, "pipe", colalign=align)
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        memory = "" if math.isnan(self.peak_memory_mib) else f"{self.peak_memory_mib:.0f} MiB "
        return (
            f"{times}\n{self.images_per_second:.2f} images/s ({self.images} images in "
            f"{self.seconds:.1f} s, {processes} on {self.device})\n"
            f"peak memory: {memory}({self.peak_memory_kind})"
        )


def _row(name: str, value: float, total: float) -> tuple[str, str, str]:
    return name, f"{value:.1f} ms", f"{100 * value / total:.0f} %" if total else ""


@dataclass
class Stopwatch:
    """Splits the time of one process into stages that add up to the total.

    Attributes:
        seconds: the time of each stage since the start.
        model_stages: the same for the parts of the model.
        images, batches: their numbers since the start.
        all_images: the total number, including the warm-up.
        scoring_seconds: the time of the final scoring.
        peak_memory_mib: the peak memory of this process.
    """

    device: torch.device
    seconds: dict[str, float] = field(init=False)
    model_stages: dict[str, float] = field(init=False)
    images: int = field(init=False)
    batches: int = field(init=False)
    all_images: int = 0
    scoring_seconds: float = 0.0
    peak_memory_mib: float = math.nan

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Discards the measurements and starts the first stage."""
        self.seconds = dict.fromkeys(("data", "model", "post", "evaluation"), 0.0)
        self.model_stages = {}
        self.images = self.batches = 0
        self._since = self._now()

    def lap(self, stage: str) -> None:
        """Ends a stage and starts the next."""
        now = self._now()
        self.seconds[stage] += now - self._since
        self._since = now

    def add_model_stages(self, milliseconds: Mapping[str, float]) -> None:
        """Adds the parts of one call of the model."""
        for part, ms in milliseconds.items():
            self.model_stages[part] = self.model_stages.get(part, 0.0) + ms / 1e3

    def count(self, images: int) -> None:
        """Counts a batch of images."""
        self.images += images
        self.all_images += images
        self.batches += 1

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return sum(self.seconds.values())

    def _now(self) -> float:
        # Kernels run asynchronously: without waiting, their time would count for a later stage.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def combine(
    watches: Sequence[Stopwatch], *, split: bool, peak_kind: str, device: torch.device
) -> InferenceSpeed:
    """The speed of all processes together.

    Args:
        watches: one per process, at least one.
        split: whether post-processing was timed separately.
        peak_kind: from :func:`peak_memory`.
        device: the device of this process's model.
    """
    images = sum(watch.images for watch in watches)
    seconds = max(watch.total for watch in watches)
    scoring = max(watch.scoring_seconds for watch in watches)
    all_images = sum(watch.all_images for watch in watches)

    def milliseconds(stage: str) -> float:
        return 1000 * sum(watch.seconds[stage] for watch in watches) / max(images, 1)

    parts = dict.fromkeys(part for watch in watches for part in watch.model_stages)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    return InferenceSpeed(
        images=images,
        seconds=seconds,
        images_per_second=images / seconds if seconds else 0.0,
        data_ms=milliseconds("data"),
        inference_ms=milliseconds("model"),
        postprocessing_ms=milliseconds("post") if split else None,
        evaluation_ms=milliseconds("evaluation") + 1000 * scoring / max(all_images, 1),
        peak_memory_mib=max(watch.peak_memory_mib for watch in watches),
        peak_memory_kind=peak_kind,
        processes=len(watches),
        device=f"{device} ({name})",
        inference_stages_ms={
            part: 1000 * sum(w.model_stages.get(part, 0.0) for w in watches) / max(images, 1)
            for part in parts
        },
    )


def peak_memory(device: torch.device) -> tuple[float, str]:
    """The peak memory in MiB, and what it measures."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "GPU memory allocated by PyTorch"
    try:
        import resource
    except ImportError:
        return math.nan, "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return peak / unit, "resident memory of the process since its start"
