"""MODEL.FREEZE: excludes parts of a model from training by name."""

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from mask_rcnn_plus.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes parameters from training, in place, and logs them.

    Args:
        model: not wrapped for distributed training.
        patterns: names of modules or parameters, with the wildcards of file names: ``*``, ``?``
            and ``[2-4]``. (A regular expression in an untrusted config could run forever.)

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    if not patterns:
        return
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if _matches(name, pattern)]
        if not matching:
            children = ", ".join(name for name, _ in model.named_children())
            modules = [name for name, m in model.named_modules() if list(m.parameters())]
            hint = did_you_mean(pattern, [*modules, *parameters]) or f"; modules: {children}"
            raise UserError(f"MODEL.FREEZE: '{pattern}' matches no module or parameter{hint}")
        for name in matching:
            parameters[name].requires_grad = False
        count = sum(parameters[name].numel() for name in matching)
        logger.info(
            f"MODEL.FREEZE '{pattern}': {len(matching)} tensors, {count:,} parameters, from "
            f"{matching[0]} to {matching[-1]}"
        )
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not trained:
        raise UserError("MODEL.FREEZE leaves nothing to train: remove a pattern")
    total = sum(p.numel() for p in parameters.values())
    logger.info(f"MODEL.FREEZE: {trained:,} of {total:,} parameters are trained")


def freeze_mode(model: nn.Module, patterns: Sequence[str]) -> None:
    """Puts frozen norms and dropouts into evaluation mode; call it after ``model.train()``.

    The model may be wrapped for distributed training; the patterns are those of :func:`freeze`.
    """
    for name, module in stateful_modules(getattr(model, "module", model)):
        # A pattern may also name a parameter or statistic of the module.
        if any(_matches(f"{name}.running_mean", pattern) for pattern in patterns):
            module.eval()


def stateful_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that draw random numbers or update statistics in training mode."""
    for name, module in model.named_modules():
        kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
        if isinstance(module, kinds) or type(module).__name__ in ("DropPath", "DropBlock2d"):
            yield name, module


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
