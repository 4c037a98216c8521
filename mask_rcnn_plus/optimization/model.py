"""An optimized model, a detectron2 model for inference only, and the report about it."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.optimization import onednn
from mask_rcnn_plus.optimization.layers import INFERENCE_ONLY


@dataclass
class OptimizationReport:
    """The changes that :func:`mask_rcnn_plus.optimize` made; ``print`` shows them.

    Attributes:
        device, dtype: the model's device, and the dtype of its weights and maps.
        done: the optimized parts, one line each.
        kept: the parts that run as before, with the reason, one line each.
        weight_mib: memory of the copy's weights and constants, which it shares with no other model.
    """

    device: str
    dtype: str
    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    weight_mib: float = 0.0

    def __str__(self) -> str:
        memory = f"{self.weight_mib:.1f} MiB of weights of its own"
        lines = [f"optimized for {self.dtype} on {self.device}, {memory}"]
        lines += [f"  done: {line}" for line in self.done]
        lines += [f"  unchanged: {line}" for line in self.kept]
        return "\n".join(lines)


class OptimizedModel(nn.Module):
    """Mixin for the class of an optimized model; the original model's class stays its base.

    Attributes:
        optimization_report: what was optimized, and what was not.
        optimization_dtype: dtype of weights and maps.
    """

    optimization_report: OptimizationReport
    optimization_dtype: torch.dtype

    def train(self, mode: bool = True) -> nn.Module:
        """
        Raises:
            UserError: ``mode`` is True; an optimized model stays in evaluation mode.
        """
        if mode:
            raise UserError(INFERENCE_ONLY)
        return super().train(False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            UserError: always; the weights here are folded, permuted and cast.
        """
        raise UserError(
            "an optimized model cannot load other weights: load them into the original model and "
            "optimize that again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is created at run time, so a pickle names its base instead.
        return _blank, (type(self).__bases__[-1],), self.__getstate__()


class OptimizedRCNN(OptimizedModel):
    """Mixin for an optimized ``GeneralizedRCNN``: inference under autocast.

    Converted layers cast their inputs themselves; autocast casts those of the other layers.
    """

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: Any = None,
        do_postprocess: bool = True,
    ) -> Any:
        """As ``GeneralizedRCNN.inference``."""
        reduced = self.optimization_dtype != torch.float32
        device = self.device.type
        autocast = torch.autocast(device, self.optimization_dtype, enabled=reduced)
        # detectron2 detects nothing in an image with NaN; oneDNN's ReLU would turn NaN into 0.
        not_finite = device == "cpu" and not _are_finite(batched_inputs)
        with autocast, onednn.disabled(not_finite):
            raw = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        for instances in raw:
            for name, value in instances.get_fields().items():
                if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                    instances.set(name, value.float())
        if not do_postprocess:
            return raw
        return self._postprocess(raw, batched_inputs, [i.image_size for i in raw])


def as_optimized(
    model: nn.Module, report: OptimizationReport, dtype: torch.dtype
) -> OptimizedModel:
    """A model with the parts of ``model``, in evaluation mode, that refuses training.

    Its class is a subclass of the model's, so it can be used wherever detectron2 expects that.
    Since the arguments of the model's constructor are unknown, it receives the model's attributes,
    as in unpickling.
    """
    optimized = _blank(type(model))
    optimized.__setstate__(vars(model))
    optimized.optimization_report, optimized.optimization_dtype = report, dtype
    return optimized


def _blank(base: type[nn.Module]) -> Any:
    cls = _optimized_class(base)
    return cls.__new__(cls)


@functools.cache
def _optimized_class(base: type[nn.Module]) -> type[OptimizedModel]:
    mixin = OptimizedModel
    if issubclass(base, GeneralizedRCNN) and base.inference is GeneralizedRCNN.inference:
        mixin = OptimizedRCNN
    return type(f"Optimized{base.__name__}", (mixin, base), {"__module__": base.__module__})


def _are_finite(inputs: list[dict[str, Any]]) -> bool:
    images = (sample["image"] for sample in inputs)
    return all(torch.isfinite(image).all() for image in images if image.is_floating_point())
