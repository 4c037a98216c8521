"""The time of each part of a model, measured by hooks."""

import time

import pytest
import torch
from torch import nn

from mask_rcnn_plus.evaluation.stages import OTHER, StageTimer, stage_modules
from tests.modeling.models import build

CPU = torch.device("cpu")


class TimedModule(nn.Module):
    """Spends time itself and calls its inner module twice."""

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


def test_a_stage_excludes_inner_stages_and_all_add_up(clock: list[float]) -> None:
    inner = TimedModule(0.010)
    outer = TimedModule(0.003, inner)
    timer = StageTimer({"outer": [outer], "inner": [inner]}, CPU)
    with timer.running() as times:
        outer(clock)
        with timer.stage("after"):
            clock[0] += 0.5
        clock[0] += 0.001
    expected = {"outer": 6.0, "inner": 40.0, "after": 500.0, "other": 1.0}
    assert times == pytest.approx(expected)
    # Outside running() nothing is counted, and each run starts from zero.
    outer(clock)
    timer.begin("x")
    timer.end()
    with timer.running() as again:
        inner(clock)
    assert again == pytest.approx({"inner": 20.0, "other": 0.0})
    assert not inner._forward_hooks


def test_an_error_leaves_no_hooks(clock: list[float]) -> None:
    module = TimedModule(1.0)
    timer = StageTimer({"stage": [module]}, CPU)
    with pytest.raises(TypeError), timer.running():
        module(None)
    assert not module._forward_hooks and not module._forward_pre_hooks
    with timer.running() as times:
        module(clock)
    assert times["stage"] == pytest.approx(2000.0)


class Event:
    """A CUDA event on a simulated clock."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_uses_the_stream_of_a_gpu_that_is_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    gpu = torch.device("cuda:1")
    timer = StageTimer({}, gpu)
    with timer.running() as times:
        Event.now = 2.0
        with timer.stage("paste"):
            Event.now = 5.0
    assert times == {"other": 2.0, "paste": 3.0}
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
    stages = set(stage_modules(build(architecture)))
    assert has <= stages and not lacks & stages


def test_counts_every_head_of_a_cascade() -> None:
    # Three heads and three predictors, in ModuleLists that are never called themselves.
    assert len(stage_modules(build("cascade"))["box head"]) == 6
    assert OTHER == "other"
