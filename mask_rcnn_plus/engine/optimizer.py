"""Builds the optimizer of a config."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """detectron2's SGD, or AdamW with the same rules for norm layers, biases and clipping.

    With SOLVER.FUSED one kernel updates all parameters, with slightly different rounding.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    fused = True if solver.FUSED else None
    if solver.OPTIMIZER == "ADAMW":
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(groups, solver.BASE_LR, fused=fused)
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    return optimizer(
        groups,
        solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        fused=fused,
    )
