"""An optimised model: a detectron2 model for inference alone."""

import functools
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.optimization import onednn
from mask_rcnn_plus.optimization.report import OptimizationReport


class OptimizedModel(nn.Module):
    """Mixed into the class of the model that was optimised, which stays its base.

    Attributes:
        optimization_report: what was optimised, and what was not.
        optimization_dtype: of weights and maps.
    """

    optimization_report: OptimizationReport
    optimization_dtype: torch.dtype

    def train(self, mode: bool = True) -> nn.Module:
        """Evaluation mode is the only one.

        Raises:
            UserError: ``mode`` is True.
        """
        if mode:
            raise UserError(
                "an optimised model is for inference alone: train the model that it was made of"
            )
        return super().train(False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            UserError: always; weights here are folded, permuted and cast.
        """
        raise UserError(
            "an optimised model takes no other weights: load them into the model that it was made "
            "of, and optimise that again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names its base.
        return _blank, (type(self).__bases__[-1],), self.__getstate__()


class OptimizedRCNN(OptimizedModel):
    """The part of an optimised ``GeneralizedRCNN``: its inference under autocast.

    What was converted casts what it gets; autocast is for what was left as it was.
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
        # Of an image that is no numbers nothing is to be detected, as stock has it.
        with autocast, onednn.left_out(device == "cpu" and not _are_numbers(batched_inputs)):
            raw = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        for one in raw:
            _to_float(one)
        if not do_postprocess:
            return raw
        return self._postprocess(raw, batched_inputs, [one.image_size for one in raw])


def _are_numbers(inputs: list[dict[str, Any]]) -> bool:
    images = (one["image"] for one in inputs)
    return all(torch.isfinite(image).all() for image in images if image.is_floating_point())


def _to_float(instances: Any) -> None:
    for name, value in instances.get_fields().items():
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            instances.set(name, value.float())


@functools.cache
def optimized_class(base: type[nn.Module]) -> type[nn.Module]:
    """A model's class as an optimised model's."""
    part = OptimizedModel
    if issubclass(base, GeneralizedRCNN) and base.inference is GeneralizedRCNN.inference:
        part = OptimizedRCNN
    return type(f"Optimized{base.__name__}", (part, base), {"__module__": base.__module__})


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = optimized_class(base)
    return cls.__new__(cls)
