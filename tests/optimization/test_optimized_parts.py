"""Parts of an optimized model that are compiled or captured as CUDA graphs, and failures."""

import copy
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mask_rcnn_plus import optimize
from mask_rcnn_plus.evaluation.stages import StageTimer, stage_modules
from mask_rcnn_plus.optimization import OptimizationReport, wrappers
from mask_rcnn_plus.optimization.layers import InferenceLayer
from mask_rcnn_plus.optimization.wrappers import Compiled, GraphedBackbone
from tests.optimization.test_optimization import MODELS, SIZES, assert_same, detect, images, lively


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lively(MODELS["resnet-18, batch norm"]())


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> nn.Module:
    return optimize(model)


def use_compiler(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        wrappers.torch, "compile", lambda f, **kwargs: compile_(f, backend=backend, **kwargs)
    )


@pytest.mark.slow
def test_compiled_model_and_its_copies_detect_the_same_for_any_size(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:  # traces without compiling
        traced.append(len(inputs))
        return graph.forward

    use_compiler(monkeypatch, backend)
    torch._dynamo.reset()
    fast = optimize(model, compile=True)
    assert "proposal_generator.rpn_head: torch.compile" in fast.optimization_report.done
    assert not fast.optimization_report.kept
    # Other parts keep oneDNN.
    assert fast.roi_heads.box_head.fc1.fused and not fast.backbone.part.fpn_output2.fused
    assert fast.backbone.size_divisibility == 32 and fast.backbone.output_shape()["p2"].stride == 4
    for sizes in (SIZES, ((64, 96),), ((33, 130),)):
        assert_same(detect(fast, images(*sizes)), detect(model, images(*sizes)))
    # One graph of the backbone and one of the RPN's head, and at most two more for single images.
    assert 2 <= len(traced) <= 6
    before = len(traced)
    timer = StageTimer(stage_modules(fast), torch.device("cpu"))
    with timer.running() as stages:
        detect(fast, images((64, 96)))
    assert {"backbone", "RPN head", "box head"} <= set(stages)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(detect(again), detect(model))
        assert again.backbone._works
    # Hooks do not split the graphs, and copies reuse the compiled code.
    assert len(traced) == before


def test_parts_that_cannot_be_compiled_run_uncompiled_and_are_named(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        tries.append(1)
        raise RuntimeError("no working C++ compiler")

    use_compiler(monkeypatch, backend)
    torch._dynamo.reset()
    fast = optimize(model, compile=True)
    for _ in range(2):
        assert_same(detect(fast), detect(model))
    assert len(tries) == 2
    kept = "\n".join(fast.optimization_report.kept)
    assert "backbone: without torch.compile, which failed" in kept
    assert "rpn_head: without torch.compile" in kept and "no working C++ compiler" in kept
    # Uncompiled parts use oneDNN again.
    layers = [item for item in fast.modules() if isinstance(item, InferenceLayer)]
    assert all(layer.fused for layer in layers)
    assert_same(detect(pickle.loads(pickle.dumps(fast))), detect(model))
    assert len(tries) == 2


@pytest.mark.slow
def test_default_compiler_computes_the_same() -> None:
    torch._dynamo.reset()
    part = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    part = lively(part).to(memory_format=torch.channels_last)
    report = OptimizationReport(device="cpu", dtype="fp32")
    compiled = Compiled(part, name="backbone", report=report)
    with torch.no_grad():
        for size in ((2, 3, 8, 6), (2, 3, 5, 9)):
            x = torch.randn(size, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(compiled(x), part(x), rtol=0, atol=1e-5)
            assert compiled(x * torch.nan).isnan().all()
    assert not report.kept and compiled._works


def test_wrong_input_is_not_a_compiler_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_compiler(monkeypatch, "eager")
    report = OptimizationReport(device="cpu", dtype="fp32")
    compiled = Compiled(nn.Linear(3, 2), name="head", report=report)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compiled(torch.zeros(1, 5))
    assert compiled._works and not report.kept


class FakeCuda:
    """The functions of torch.cuda for captures, on the CPU.

    A graph repeats the call that was captured within ``graph``, and writes into the same maps.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.current: list[Any] = ["outside"]
        self.captures: list[dict[str, Any]] = []
        self.breaks = False
        self.waits: list[Any] = []

    def stream(self, name: str) -> Any:
        waits = self.waits
        return type(
            "Stream",
            (),
            {
                "wait_stream": lambda self, other: None,
                "wait_event": lambda self, event: waits.append(event),
                "record_event": lambda self: object(),
                "name": name,
            },
        )()

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    @contextmanager
    def graph(self, graph: Any, **options: Any) -> Iterator[None]:
        self.captures.append(options)
        self.current.append(options["stream"])
        seen: list[tuple[Tensor, Any]] = []
        handle = self.backbone.register_forward_hook(lambda m, x, out: seen.append((x[0], out)))
        yield
        handle.remove()
        if self.breaks:  # like torch, without restoring the previous stream
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current.pop()
        ((source, maps),) = seen

        def replay() -> None:
            time.sleep(0)  # lets another thread run
            for name, value in self.backbone(source).items():
                maps[name].copy_(value)

        graph.replay = replay

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wrappers, "DEVICE", "cpu")
        for name, value in {
            "device": lambda device: nullcontext(),
            "Stream": lambda device: self.stream("side"),
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda device=None: self.stream("outside"),
            "stream": self.on,
            "set_stream": lambda stream: self.current.__setitem__(slice(None), ["outside"]),
            "CUDAGraph": lambda: type("Graph", (), {})(),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"p2": x * self.scale, "p3": x[..., ::2] + self.scale}


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> tuple[GraphedBackbone, FakeCuda]:
    backbone = Pyramid()
    fake = FakeCuda(backbone)
    fake.install(monkeypatch)
    return GraphedBackbone(backbone, report=OptimizationReport("cuda", "fp32")), fake


def image(width: int, value: float) -> Tensor:
    return torch.full((1, 3, 4, width), value)


def assert_right(maps: dict[str, Tensor], x: Tensor) -> None:
    assert torch.equal(maps["p2"], x * 2) and torch.equal(maps["p3"], x[..., ::2] + 2)


@torch.no_grad()
def test_shape_is_captured_at_its_second_use_and_results_are_copies(
    graphed: tuple[GraphedBackbone, FakeCuda],
) -> None:
    backbone, fake = graphed
    kept = []
    for value in range(5):
        for width in (6, 8):
            x = image(width, float(value))
            kept.append((backbone(x), x))
            assert len(fake.captures) == (0 if value == 0 else 2 if (value, width) != (1, 6) else 1)
    for maps, x in kept:
        assert_right(maps, x)
    assert all(item["pool"] == "pool" for item in fake.captures)
    assert len({id(item["stream"]) for item in fake.captures}) == 1
    assert {item["capture_error_mode"] for item in fake.captures} == {"thread_local"}
    # Each replay but the first waits for the previous one, on any stream.
    assert len(fake.waits) == 2 * 4 - 1
    with torch.enable_grad():
        assert backbone(image(6, 1.0))["p2"].requires_grad


def test_graph_from_inference_mode_works_outside_it_and_autocast_has_its_own(
    graphed: tuple[GraphedBackbone, FakeCuda],
) -> None:
    backbone, fake = graphed
    with torch.inference_mode():
        for value in (1.0, 2.0):
            backbone(image(6, value))
    with torch.no_grad():
        assert_right(backbone(image(6, 3.0)), image(6, 3.0))
        assert len(fake.captures) == 1
        with torch.autocast("cpu", torch.bfloat16):
            backbone(image(6, 1.0))
            assert len(fake.captures) == 1
            backbone(image(6, 1.0))
        assert len(fake.captures) == 2


@torch.no_grad()
def test_rare_shapes_are_not_captured_repeatedly_and_a_frequent_one_replaces_another(
    graphed: tuple[GraphedBackbone, FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, fake = graphed
    for value in range(20):
        for width in range(2, 24, 2):
            x = image(width, float(value))
            assert_right(backbone(x), x)
    assert len(fake.captures) == len(backbone._graphs) == wrappers.MAX_GRAPHS
    for value in range(41):
        backbone(image(30, float(value)))
    assert len(fake.captures) == wrappers.MAX_GRAPHS + 1
    assert len(backbone._graphs) == wrappers.MAX_GRAPHS
    assert any(key[0][-1] == 30 for key in backbone._graphs)
    monkeypatch.setattr(wrappers, "_MAX_SHAPES", 20)
    for width in range(100, 160):
        backbone(image(width, 1.0))
    assert len(backbone._uses) <= 20 and set(backbone._graphs) <= set(backbone._uses)


@torch.no_grad()
def test_failed_capture_is_not_repeated_and_is_named(
    graphed: tuple[GraphedBackbone, FakeCuda],
) -> None:
    backbone, fake = graphed
    fake.breaks = True
    for value in range(4):
        x = image(6, float(value))
        assert_right(backbone(x), x)
    assert len(fake.captures) == 1 and fake.current == ["outside"]
    (kept,) = backbone.report.kept
    assert kept.startswith("backbone: without CUDA graphs, which failed (RuntimeError: operation")


def test_threads_get_separate_maps(graphed: tuple[GraphedBackbone, FakeCuda]) -> None:
    backbone, _ = graphed
    wrong: list[float] = []

    def run(value: float) -> None:
        with torch.no_grad():
            for _ in range(50):
                maps = backbone(image(6, value))
                if not torch.equal(maps["p2"], image(6, 2 * value)):
                    wrong.append(value)

    threads = [threading.Thread(target=run, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_copied_pickled_and_moved_models_capture_again(
    graphed: tuple[GraphedBackbone, FakeCuda],
) -> None:
    backbone, _ = graphed
    for _ in range(2):
        backbone(image(6, 1.0))
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), backbone.double()):
        assert not other._graphs and other.calls > 0
    # The current weights are used.
    backbone.part.scale.fill_(3.0)
    assert torch.equal(backbone(image(6, 1.0))["p2"], image(6, 3.0).double())


def test_graphed_backbone_runs_without_a_gpu(model: nn.Module, fast: nn.Module) -> None:
    graphed = copy.deepcopy(fast)
    graphed.backbone = GraphedBackbone(graphed.backbone, report=graphed.optimization_report)
    assert graphed.backbone.size_divisibility == 32
    again = pickle.loads(pickle.dumps(graphed))
    for _ in range(3):
        assert_same(detect(again), detect(fast))
    assert not again.backbone._graphs
