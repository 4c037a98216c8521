"""What stays in fp32 where a model's maps are bf16 or fp16."""

import torch
from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from mask_rcnn_plus.optimization.report import OptimizationReport

# Of RetinaNet, and of FCOS, whose head is one of RetinaNet's kind.
_RESULTS = ("cls_score", "bbox_pred", "ctrness")


def keep_single(model: nn.Module, dtype: torch.dtype, report: OptimizationReport) -> None:
    """Scores and boxes of detectors without RoIs, whose NMS takes no others; and deformable
    convolutions, which not every device computes in another dtype.

    Args:
        model: in place; its convolutions are converted.
        dtype: of its maps.
        report: of the model.
    """
    if dtype == torch.float32:
        return
    for name, module in model.named_modules():
        if isinstance(module, RetinaNetHead):
            for part in _RESULTS:
                if isinstance(layer := getattr(module, part, None), nn.Module):
                    layer.register_forward_hook(_float_result)
            report.done.append(f"{name}: scores and boxes in fp32")
        elif isinstance(module, DeformConv | ModulatedDeformConv):
            module.register_forward_pre_hook(_float_inputs)


def _float_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in inputs)


def _float_result(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return result.float()
