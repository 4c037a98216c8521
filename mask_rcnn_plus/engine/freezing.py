"""MODEL.FREEZE: parts of a model that are not trained, by name."""

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from mask_rcnn_plus.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes parameters from training, in place, and logs which.

    Args:
        model: not wrapped for distributed training.
        patterns: names of modules or parameters from their beginning to a dot or their end, with
            the wildcards of file names: ``*``, ``?`` and ``[2-4]``. (Not regular expressions, of
            which one line of a stranger's config could take for ever.)

    Raises:
        UserError: a pattern fits no parameter, or nothing is left to train.
    """
    if not patterns:
        return
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        chosen = [name for name in parameters if _fits(name, pattern)]
        if not chosen:
            raise UserError(
                f"MODEL.FREEZE names '{pattern}', which no parameter's name begins with"
                f"{did_you_mean(pattern, _modules_of(parameters)) or _children_of(model)}"
            )
        for name in chosen:
            parameters[name].requires_grad = False
        count = sum(parameters[name].numel() for name in chosen)
        logger.info(
            f"MODEL.FREEZE '{pattern}': {len(chosen)} tensors, {count:,} numbers, from "
            f"{chosen[0]} to {chosen[-1]}"
        )
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not trained:
        raise UserError("MODEL.FREEZE leaves nothing to train: take something off it")
    total = sum(p.numel() for p in parameters.values())
    logger.info(f"MODEL.FREEZE: {trained:,} of {total:,} numbers are trained")


def hold(model: nn.Module, patterns: Sequence[str]) -> None:
    """Lets what is frozen work in training as in evaluation; call it after ``model.train()``.

    Args:
        model: may be wrapped for distributed training.
        patterns: as for :func:`freeze`.
    """
    for name, module in draws_or_counts(getattr(model, "module", model)):
        # A statistic of the module stands for it, so that the name of one will do.
        if any(_fits(f"{name}.running_mean", pattern) for pattern in patterns):
            module.eval()


def draws_or_counts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose training mode draws at random or keeps statistics, with their names."""
    for name, module in model.named_modules():
        kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
        if isinstance(module, kinds) or type(module).__name__ in ("DropPath", "DropBlock2d"):
            yield name, module


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _modules_of(parameters: dict[str, torch.Tensor]) -> list[str]:
    """All names that begin a parameter's: of modules, and of the parameters themselves."""
    names = {}
    for name in parameters:
        parts = name.split(".")
        names.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return list(names)


def _children_of(model: nn.Module) -> str:
    return f"; they begin with {', '.join(name for name, _ in model.named_children())}"
