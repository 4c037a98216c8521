"""Builds the optimizer of a config."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from mask_rcnn_plus.config import complete


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """detectron2's SGD, or AdamW with the same rules for norm layers, biases and clipping.

    With SOLVER.FUSED one kernel updates all parameters, with slightly different rounding.
    """
    solver = complete(cfg).SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    options = {"lr": solver.BASE_LR, "fused": solver.FUSED or None}
    if solver.OPTIMIZER == "ADAMW":
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, **options)
    options.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    options.update(weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(groups, **options)
