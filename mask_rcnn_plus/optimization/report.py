"""What was optimised in a model, and what was not."""

from dataclasses import dataclass, field


@dataclass
class OptimizationReport:
    """What :func:`mask_rcnn_plus.optimize` did; ``print`` shows it.

    Attributes:
        device, dtype: of the model and of its weights and maps.
        done: what was optimised, in words.
        kept: what runs as it did, with the reason.
        weight_mib: memory of the copy's weights and constants, which it shares with nobody.
    """

    device: str
    dtype: str
    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    weight_mib: float = 0.0

    def __str__(self) -> str:
        memory = f"{self.weight_mib:.1f} MiB of weights of its own"
        lines = [f"optimised for {self.dtype} on {self.device}, {memory}"]
        lines += [f"  done: {one}" for one in self.done]
        lines += [f"  as it was: {one}" for one in self.kept]
        return "\n".join(lines)
