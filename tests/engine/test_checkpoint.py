"""A run only continues from a state that fits it."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from mask_rcnn_plus.engine.checkpoint import check_run_state
from mask_rcnn_plus.errors import UserError

WEIGHT = torch.nn.Parameter(torch.ones(3))


def optimizer() -> torch.optim.Optimizer:
    sgd = torch.optim.SGD([WEIGHT], lr=0.1, momentum=0.9)
    WEIGHT.grad = torch.ones(3)
    sgd.step()
    return sgd


def valid_state() -> dict[str, Any]:
    return {
        "iteration": 4,
        "_trainer": {"iteration": 4, "optimizer": deepcopy(optimizer().state_dict())},
        "hooks": {
            "LRScheduler": {"last_epoch": 5, "base_lrs": [0.1]},
            "Evaluation": {"value": 1.5},
        },
        "data": {"seed": 1, "images": 10, "bad": {"a.png": "image 'a.png' cannot be used"}},
    }


def check(state: Any) -> None:
    check_run_state(state, optimizer=optimizer(), name="SGD")


def test_a_valid_state_and_detectron2s_own_pass() -> None:
    check(valid_state())
    check({"iteration": 4})


OPTIMIZER = ("_trainer", "optimizer")
MOMENTUM = (*OPTIMIZER, "state", 0, "momentum_buffer")


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("iteration",), "4", "not a resumable checkpoint"),
        (("iteration",), -100, "invalid iteration"),
        (("data", "images"), -1, "invalid .*images"),
        (("data", "images"), True, "invalid .*images"),
        (("data", "seed"), "1", "invalid .*seed"),
        (("data",), [], "not a resumable checkpoint"),
        (("_trainer",), 1, "not a resumable checkpoint"),
        (OPTIMIZER, 1, "not a resumable checkpoint"),
        ((*OPTIMIZER, "param_groups"), [1], "not a resumable checkpoint"),
        ((*OPTIMIZER, "param_groups"), [{"betas": 1, "params": [0]}], "SOLVER.OPTIMIZER is 'SGD'"),
        ((*OPTIMIZER, "param_groups", 0, "params"), [0, 1], r"MODEL\.FREEZE"),
        ((*OPTIMIZER, "state"), {7: {"momentum_buffer": torch.ones(3)}}, "not a resumable"),
        ((*OPTIMIZER, "state"), {0: "x"}, "not a resumable checkpoint"),
        (MOMENTUM, torch.ones(4), r"MODEL\.FREEZE"),
        (MOMENTUM, torch.tensor([1.0, torch.nan, 1]), "momentum_buffer of parameter 0 is not fin"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    place: tuple[Any, ...], value: Any, expected: str
) -> None:
    state: Any = valid_state()
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(UserError, match=expected):
        check(state)
