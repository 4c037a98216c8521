"""What a checkpoint says of its run, looked at before the run takes it over.

Restoring takes whatever lies there: counts that are none, and figures of other shapes, would show
only iterations later.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.errors import UserError

_MOST_IMAGES = 10**9  # their order is gone through once more
_MOST_IN_BATCH = 2**16


def check_run_state(state: Any, *, optimizer: torch.optim.Optimizer, asked: str) -> None:
    """Compares a trainer's stored state with what there can be.

    Args:
        state: what ``Trainer.state_dict`` gives, or what a stranger has put in its place.
        optimizer: of the run that goes on.
        asked: its SOLVER.OPTIMIZER, for the message.

    Raises:
        UserError: it is of another optimiser or of no run at all.
    """
    _require(isinstance(state, Mapping), "a state")
    iteration = state.get("iteration", 0)
    _require(_is_count(iteration, least=-1), "a number of iterations")
    data = state.get("data", {})
    _require(isinstance(data, Mapping), "a place in the data")
    most = min(_MOST_IMAGES, (iteration + 1) * _MOST_IN_BATCH)
    _require(_is_count(data.get("images", 0), most=most), "a number of images")
    _require(_is_count(data.get("seed", 0), most=2**63), "a seed")
    bad = data.get("bad", {})
    _require(
        isinstance(bad, Mapping)
        and all(isinstance(one, str) for pair in bad.items() for one in pair),
        "skipped images",
    )
    hooks = state.get("hooks", {})
    _require(isinstance(hooks, Mapping), "hooks")
    for name, numbers in hooks.items():
        _require(isinstance(numbers, Mapping) and _plain(numbers), f"figures of {name:.40}")
    inner = state.get("_trainer", {})
    _require(isinstance(inner, Mapping), "an optimiser")
    if stored := inner.get("optimizer"):
        _check_optimizer(stored, optimizer, asked)


def _check_optimizer(stored: Any, optimizer: torch.optim.Optimizer, asked: str) -> None:
    groups, values = _parts(stored)
    if _kind(groups) != _kind(optimizer.param_groups):
        raise UserError(
            f"SOLVER.OPTIMIZER is '{asked}', and the checkpoint to resume from was trained with "
            "the other one: keep it, or start anew from its weights with MODEL.WEIGHTS and without "
            "--resume"
        )
    if _sizes(groups) != _sizes(optimizer.param_groups):
        raise UserError(
            "the checkpoint to resume from was trained with other parameters frozen (MODEL.FREEZE, "
            "FREEZE_AT): keep them, or start anew from its weights with MODEL.WEIGHTS and without "
            "--resume"
        )
    for group in groups:
        numbers = {key: value for key, value in group.items() if key != "params"}
        _require(_plain(numbers), "settings of the optimiser")
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for index, state in values.items():
        _require(_is_count(index, most=len(parameters) - 1), "a parameter's momentum")
        _require(isinstance(state, Mapping), "a parameter's momentum")
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                fits = value.dim() == 0 or value.shape == parameters[index].shape
                _require(fits, f"the optimiser's {name} of the parameter {index}, in its shape")
            else:
                _require(value is None or isinstance(value, int | float), f"the optimiser's {name}")
        broken = saving.first_not_finite(state)
        _require(not broken, f"the optimiser's {broken} of the parameter {index}, finite")


def _parts(stored: Any) -> tuple[list[dict[str, Any]], Mapping[Any, Any]]:
    groups = stored.get("param_groups") if isinstance(stored, Mapping) else None
    _require(
        isinstance(groups, list)
        and all(isinstance(group, dict) for group in groups)
        and all(isinstance(group.get("params"), list) for group in groups),
        "an optimiser",
    )
    values = stored.get("state", {})
    _require(isinstance(values, Mapping), "an optimiser")
    return groups, values  # type: ignore[return-value]


def _plain(value: Any) -> bool:
    """Whether it is numbers, NumPy's and torch's as well, in lists and dictionaries."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and _plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float) or hasattr(value, "dtype")


def _is_count(value: Any, *, least: int = 0, most: int = 2**31) -> bool:
    return type(value) is int and least <= value <= most


def _kind(param_groups: list[dict[str, Any]]) -> set[str]:
    """What tells SGD's state from AdamW's."""
    return {"momentum", "betas"} & set().union(*param_groups)


def _sizes(param_groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in param_groups]


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise UserError(f"the checkpoint to resume from is of no run: it lacks {what}")
