"""How long each stage of an evaluation took, over all processes, and the memory it needed."""

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
    """How fast a test set was evaluated, over all processes, without the first few batches.

    Attributes:
        images: images that the rates are measured on.
        seconds: wall time of the slowest process on them, from loading to the evaluator, without
            the final scoring.
        images_per_second: images / seconds.
        data_ms: milliseconds an image takes in the process that handles it, waiting for the loader.
        inference_ms: the same for the network.
        inference_stages_ms: the parts of ``inference_ms`` by name, as far as they are known.
        postprocessing_ms: the same for rescaling boxes and dropping empty ones; None where the
            model does this, and pastes masks, within the inference.
        evaluation_ms: the same for the evaluator, which pastes and encodes masks, with the final
            scoring spread over all images.
        peak_memory_mib: of the process that took the most, in MiB; nan where it is not known.
        peak_memory_kind: what ``peak_memory_mib`` counts.
        processes: how many shared the images.
        device: of the model, with its name.
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
        """The figures for people: one line a stage, then the rate and the memory."""
        stages = {
            "data": self.data_ms,
            "inference": self.inference_ms,
            "post-processing": self.postprocessing_ms,
            "evaluation": self.evaluation_ms,
        }
        whole = sum(value for value in stages.values() if value is not None)
        rows = []
        for name, value in stages.items():
            rows.append((name, "in inference", "") if value is None else _row(name, value, whole))
            if name == "inference":
                parts = self.inference_stages_ms.items()
                rows += [_row(f"- {part}", ms, whole) for part, ms in parts]
        rows.append(("all", f"{whole:.1f} ms", ""))
        times = tabulate(
            rows, ("stage", "an image", "share"), "pipe", colalign=("left", "right", "right")
        )
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        memory = "" if math.isnan(self.peak_memory_mib) else f"{self.peak_memory_mib:.0f} MiB "
        return (
            f"{times}\n{self.images_per_second:.2f} images/s ({self.images} images in "
            f"{self.seconds:.1f} s, {processes} on {self.device})\n"
            f"peak memory: {memory}({self.peak_memory_kind})"
        )


def _row(name: str, value: float, whole: float) -> tuple[str, str, str]:
    return name, f"{value:.1f} ms", f"{100 * value / whole:.0f} %" if whole else ""


@dataclass
class Stopwatch:
    """Splits the time of one process into stages that add up to the whole, in seconds."""

    device: torch.device
    seconds: dict[str, float] = field(init=False)
    model_stages: dict[str, float] = field(init=False)
    images: int = field(init=False)
    batches: int = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forgets what was measured and starts the first stage."""
        self.seconds = dict.fromkeys(("data", "model", "post", "evaluation"), 0.0)
        self.model_stages = {}
        self.images = self.batches = 0
        self._since = self._now()

    def lap(self, stage: str) -> None:
        """Ends a stage, and starts the next."""
        now = self._now()
        self.seconds[stage] += now - self._since
        self._since = now

    def split_model(self, milliseconds: Mapping[str, float]) -> None:
        """Adds the parts of a call of the model."""
        for part, ms in milliseconds.items():
            self.model_stages[part] = self.model_stages.get(part, 0.0) + ms / 1e3

    @property
    def total(self) -> float:
        """Seconds since the start, until the last lap."""
        return sum(self.seconds.values())

    def _now(self) -> float:
        # Kernels run behind Python's back: without waiting, their time falls to a later stage.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Share:
    """What one process measured; ``images`` counts all that it handled, warm-up included."""

    watch: Stopwatch
    images: int
    scoring_seconds: float
    peak_memory_mib: float


def combine(
    shares: Sequence[Share], *, split: bool, peak_kind: str, device: torch.device
) -> InferenceSpeed:
    """The speed of all processes together.

    Args:
        shares: one a process, at least one.
        split: whether post-processing was timed apart.
        peak_kind: from :func:`peak_memory`.
        device: of this process's model.
    """
    images = sum(share.watch.images for share in shares)
    seconds = max(share.watch.total for share in shares)
    scoring = max(share.scoring_seconds for share in shares)
    scored = sum(share.images for share in shares)

    def milliseconds(stage: str) -> float:
        return 1000 * sum(s.watch.seconds[stage] for s in shares) / max(images, 1)

    parts = dict.fromkeys(part for share in shares for part in share.watch.model_stages)
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        name = f"{device} ({torch.get_num_threads()} threads)"
    return InferenceSpeed(
        images=images,
        seconds=seconds,
        images_per_second=images / seconds if seconds else 0.0,
        data_ms=milliseconds("data"),
        inference_ms=milliseconds("model"),
        postprocessing_ms=milliseconds("post") if split else None,
        evaluation_ms=milliseconds("evaluation") + 1000 * scoring / max(scored, 1),
        peak_memory_mib=max(share.peak_memory_mib for share in shares),
        peak_memory_kind=peak_kind,
        processes=len(shares),
        device=name,
        inference_stages_ms={
            part: 1000 * sum(s.watch.model_stages.get(part, 0.0) for s in shares) / max(images, 1)
            for part in parts
        },
    )


def peak_memory(device: torch.device) -> tuple[float, str]:
    """In MiB, and what it is the peak of."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "GPU memory allocated by PyTorch"
    try:
        import resource
    except ImportError:
        return math.nan, "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return peak / unit, "resident memory of the process since its start"
