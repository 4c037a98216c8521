"""What a checkpoint says of its run is taken over only where it can be so."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from mask_rcnn_plus.engine.run_state import check_run_state
from mask_rcnn_plus.errors import UserError

WEIGHT = torch.nn.Parameter(torch.ones(3))


def optimizer() -> torch.optim.Optimizer:
    made = torch.optim.SGD([WEIGHT], lr=0.1, momentum=0.9)
    WEIGHT.grad = torch.ones(3)
    made.step()
    return made


def sound() -> dict[str, Any]:
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
    check_run_state(state, optimizer=optimizer(), asked="SGD")


def test_a_sound_state_and_detectron2s_own_pass() -> None:
    check(sound())
    check({"iteration": 4})


MOMENTUM = ("_trainer", "optimizer", "state", 0, "momentum_buffer")


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("iteration",), "4", "number of iterations"),
        (("iteration",), -100, "number of iterations"),
        (("data", "images"), 10**15, "number of images"),
        (("data", "images"), 10**8, "number of images"),
        (("data", "images"), -1, "number of images"),
        (("data", "images"), True, "number of images"),
        (("data", "seed"), "1", "a seed"),
        (("data", "bad"), {"a": 1}, "skipped images"),
        (("data", "bad"), 5, "skipped images"),
        (("data",), [], "place in the data"),
        (("hooks", "LRScheduler"), {"step": "x"}, "figures of LRScheduler"),
        (("hooks",), 1, "hooks"),
        (("_trainer",), 1, "an optimiser"),
        (("_trainer", "optimizer"), 1, "an optimiser"),
        (("_trainer", "optimizer", "param_groups"), [1], "an optimiser"),
        (("_trainer", "optimizer", "param_groups", 0, "lr"), "x", "settings of the optimiser"),
        (
            ("_trainer", "optimizer", "param_groups"),
            [{"betas": 1, "params": [0]}],
            "SOLVER.OPTIMIZER is 'SGD'",
        ),
        (("_trainer", "optimizer", "state"), {7: {}}, "momentum"),
        (MOMENTUM, "x", "momentum_buffer"),
        (MOMENTUM, torch.ones(4), "momentum_buffer of the parameter 0, in its shape"),
        (MOMENTUM, torch.tensor([1.0, torch.nan, 1]), "parameter 0, finite"),
    ],
)
def test_what_is_no_state_is_named(place: tuple[Any, ...], value: Any, expected: str) -> None:
    state: Any = sound()
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(UserError, match=expected):
        check(state)
