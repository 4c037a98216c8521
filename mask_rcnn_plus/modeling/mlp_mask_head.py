"""The fully connected mask heads of Mask R-CNN, table 2e."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import BaseMaskRCNNHead
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.errors import UserError


@ROI_MASK_HEAD_REGISTRY.register()
class MLPMaskHead(BaseMaskRCNNHead):
    """Fully connected layers from a RoI's features to its masks.

    Losses and inference are detectron2's (sigmoid a pixel, the class's own mask). Mask R-CNN,
    table 2e, has 1024-1024-80*28^2 and 1024-1024-1024-80*28^2.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        fc_dims: Sequence[int],
        output_resolution: int,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of a RoI's features; channels, height and width.
            num_classes: masks a RoI, K; 1 for class-agnostic masks.
            fc_dims: the width of each layer before the last.
            output_resolution: side of a mask, M.
            kwargs: ``loss_weight``, ``vis_period``: as detectron2's ``BaseMaskRCNNHead``.
        """
        super().__init__(**kwargs)
        self._input = (input_shape.channels, input_shape.height, input_shape.width)
        self._output = (num_classes, output_resolution, output_resolution)
        width = input_shape.channels * input_shape.height * input_shape.width
        self.fcs = []
        for number, dim in enumerate(fc_dims, 1):
            layer = nn.Linear(width, dim)
            weight_init.c2_xavier_fill(layer)
            self.add_module(f"mask_fc{number}", layer)
            self.fcs.append(layer)
            width = dim
        self.predictor = nn.Linear(width, num_classes * output_resolution**2)
        # As detectron2's convolutional head: a first mask is undecided everywhere.
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_HEAD
        for key, least in (("NUM_FC", 0), ("FC_DIM", 1), ("OUTPUT_RESOLUTION", 1)):
            if head.MLP[key] < least:
                raise UserError(
                    f"MODEL.ROI_MASK_HEAD.MLP.{key} is {head.MLP[key]}; it must be at least {least}"
                )
        if not isinstance(input_shape, ShapeSpec):
            raise UserError("MLPMaskHead needs RoIs: set a MODEL.ROI_MASK_HEAD.POOLER_TYPE")
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "fc_dims": [head.MLP.FC_DIM] * head.MLP.NUM_FC,
            "output_resolution": head.MLP.OUTPUT_RESOLUTION,
        }

    def layers(self, x: Tensor) -> Tensor:
        """
        Args:
            x: features (R, C, height, width) of the shape that the head was built for.

        Returns:
            mask logits (R, K, M, M).

        Raises:
            UserError: features of another shape.
        """
        if x.shape[1:] != self._input:
            raise UserError(
                f"MLPMaskHead was built for RoIs of {_sides(self._input)} and got "
                f"{_sides(x.shape[1:])}: C4's res5 halves them after pooling; take FusedROIHeads "
                "or a convolutional mask head"
            )
        x = x.flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return self.predictor(x).view(len(x), *self._output)


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
