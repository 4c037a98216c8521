"""Where a model's time goes, by hooks."""

import time

import pytest
import torch
from torch import nn

from mask_rcnn_plus.evaluation import stages
from mask_rcnn_plus.evaluation.stages import StageTimer, stage_modules
from tests.modeling.models import build

CPU = torch.device("cpu")


class Works(nn.Module):
    """Takes a while, of which a part is its inner module's."""

    def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.inner = inner

    def forward(self, clock: list[float]) -> None:
        clock[0] += self.seconds
        if self.inner is not None:
            self.inner(clock)
            self.inner(clock)
        clock[0] += self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_stage_is_without_those_within_it_and_all_add_up(clock: list[float]) -> None:
    inner = Works(0.010)
    outer = Works(0.003, inner)
    timer = StageTimer({"outer": [outer], "inner": [inner]}, CPU)
    with timer.running() as found:
        outer(clock)
        with timer.stage("after"):
            clock[0] += 0.5
        clock[0] += 0.001
    expected = {"outer": 6.0, "inner": 40.0, "after": 500.0, "other": 1.0}
    assert found == pytest.approx(expected)
    # Outside of running() nothing is counted, and each run counts anew.
    outer(clock)
    timer.begin("x")
    timer.end()
    with timer.running() as again:
        inner(clock)
    assert again == pytest.approx({"inner": 20.0, "other": 0.0})
    assert not inner._forward_hooks


def test_an_error_leaves_no_hooks(clock: list[float]) -> None:
    module = Works(1.0)
    timer = StageTimer({"stage": [module]}, CPU)
    with pytest.raises(TypeError), timer.running():
        module(None)
    assert not module._forward_hooks and not module._forward_pre_hooks
    with timer.running() as found:
        module(clock)
    assert found["stage"] == pytest.approx(2000.0)


class Event:
    """A mark on a GPU's own clock, which stands still until it is recorded."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_on_a_gpu_that_is_not_the_current_one_its_own_stream_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    gpu = torch.device("cuda:1")
    timer = StageTimer({}, gpu)
    with timer.running() as found:
        Event.now = 2.0
        with timer.stage("paste"):
            Event.now = 5.0
    assert found == {"other": 2.0, "paste": 3.0}
    assert waits == [gpu]


@pytest.mark.parametrize(
    ("architecture", "has", "lacks"),
    [
        ("fpn", {"backbone", "FPN", "mask pooler", "box pooler"}, {"keypoint head"}),
        ("c4", {"backbone", "box pooler", "box head", "mask head"}, {"FPN", "mask pooler"}),
        ("keypoint", {"keypoint pooler", "keypoint head"}, {"mask head"}),
    ],
)
def test_the_stages_of_architectures(architecture: str, has: set[str], lacks: set[str]) -> None:
    found = set(stage_modules(build(architecture)))
    assert has <= found and not lacks & found


def test_every_head_of_a_cascade_is_counted() -> None:
    # Three heads and three predictors, which lie in lists that are never called.
    assert len(stage_modules(build("cascade"))["box head"]) == 6
    assert stages.OTHER == "other"
