"""Parts of an optimized model that are compiled or captured as CUDA graphs, and failures."""

import copy
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mask_rcnn_plus import UserError, optimize
from mask_rcnn_plus.evaluation.stages import StageTimer, stage_modules
from mask_rcnn_plus.optimization import OptimizationReport, conversion, wrappers
from mask_rcnn_plus.optimization.layers import InferenceLayer
from mask_rcnn_plus.optimization.wrappers import Compiled, GraphedBackbone
from tests.modeling.models import ARCHITECTURES
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


class CaptureRules(TorchDispatchMode):
    """Runs only what a CUDA graph can capture: operators on tensors of the GPU.

    Tensors are fake CUDA tensors, without memory or values. So they already refuse reads by the
    host and results whose size depends on values; this mode refuses copies from and to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != "cuda":
                raise RuntimeError(f"{func} copies between the host and the GPU")
        return result


def run_by_the_rules(part: nn.Module, *size: int) -> tuple[Any, set[str]]:
    """The result of a part, with its weights as fake CUDA tensors, and the operators it calls."""
    named = [*part.named_parameters(), *part.named_buffers()]
    with FakeTensorMode(), torch.no_grad():
        fakes = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for name, t in named
        }
        x = torch.empty(size, device="cuda")
        with CaptureRules() as rules:
            return torch.func.functional_call(part, fakes, (x,)), rules.operators


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x[..., [0, 1]],
        lambda x: x + torch.ones(3),
    ],
)
def test_what_a_graph_cannot_capture_is_refused(function: Callable[[Tensor], Any]) -> None:
    assert run_by_the_rules(Call(lambda x: x * 2), 2, 3)[1] == {"aten.mul.Tensor"}
    with pytest.raises(RuntimeError) as error:
        run_by_the_rules(Call(function), 2, 3)
    assert any(word in str(error.value) for word in ("aten.", "two devices"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, "resnet-18, batch norm", "average", "group norm", "timm"]
)
def test_every_backbone_can_be_captured(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The weights are optimized on the CPU, where "fp16" is refused.
    monkeypatch.setitem(conversion.DTYPES, "fp32", dtype)
    fast = optimize(MODELS[name](), "fp32")
    maps, operators = run_by_the_rules(fast.backbone, 2, 3, 64, 96)
    assert "aten.convolution.default" in operators
    assert not any("mkldnn" in operator for operator in operators)
    assert {value.dtype for value in maps.values()} == {dtype}


class FakeGraphs:
    """``torch.cuda.make_graphed_callables`` on the CPU: each replay writes into the same maps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = 0
        self.error: Exception | None = None
        self.stream = "stream 1"
        monkeypatch.setattr(wrappers, "DEVICE", "cpu")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", self.capture)

    def capture(self, call: Any, sample_args: tuple[Tensor]) -> Any:
        if self.error:
            raise self.error
        self.captures += 1
        (source,) = sample_args
        assert not source.is_inference() and not torch.is_autocast_cache_enabled()
        maps = call(source)

        def replay(x: Tensor) -> dict[str, Tensor]:
            source.copy_(x)
            time.sleep(0)  # lets another thread run
            for name, value in call(source).items():
                maps[name].copy_(value)
            return dict(maps)

        return replay


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"p2": x * self.scale, "p3": x[..., ::2] + self.scale}


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> tuple[GraphedBackbone, FakeGraphs]:
    return GraphedBackbone(Pyramid()), FakeGraphs(monkeypatch)


def image(width: int, value: float) -> Tensor:
    return torch.full((1, 3, 4, width), value)


def assert_right(maps: dict[str, Tensor], x: Tensor) -> None:
    assert torch.equal(maps["p2"], x * 2) and torch.equal(maps["p3"], x[..., ::2] + 2)


@torch.no_grad()
def test_shape_is_captured_at_its_second_use_and_results_are_copies(
    graphed: tuple[GraphedBackbone, FakeGraphs],
) -> None:
    backbone, fake = graphed
    kept = []
    for value in range(5):
        for width in (6, 8):
            x = image(width, float(value))
            kept.append((backbone(x), x))
            assert fake.captures == (0 if value == 0 else 2 if (value, width) != (1, 6) else 1)
    for maps, x in kept:
        assert_right(maps, x)
    with torch.enable_grad():
        assert backbone(image(6, 1.0))["p2"].requires_grad
    fake.stream = "stream 2"
    for _ in range(2):
        backbone(image(6, 1.0))
    assert fake.captures == 3


def test_graph_from_inference_mode_works_outside_it_and_autocast_has_its_own(
    graphed: tuple[GraphedBackbone, FakeGraphs],
) -> None:
    backbone, fake = graphed
    with torch.inference_mode():
        for value in (1.0, 2.0):
            backbone(image(6, value))
    with torch.no_grad():
        assert_right(backbone(image(6, 3.0)), image(6, 3.0))
        assert fake.captures == 1
        with torch.autocast("cpu", torch.bfloat16):
            backbone(image(6, 1.0))
            assert fake.captures == 1
            backbone(image(6, 1.0))
        assert fake.captures == 2


@torch.no_grad()
def test_number_of_graphs_is_limited(graphed: tuple[GraphedBackbone, FakeGraphs]) -> None:
    backbone, fake = graphed
    for value in range(3):
        for width in range(2, 24, 2):
            x = image(width, float(value))
            assert_right(backbone(x), x)
    assert fake.captures == len(backbone._graphs) == wrappers.MAX_GRAPHS


@torch.no_grad()
def test_failed_capture_says_what_to_do(graphed: tuple[GraphedBackbone, FakeGraphs]) -> None:
    backbone, fake = graphed
    fake.error = RuntimeError("operation not permitted when stream is capturing")
    backbone(image(6, 1.0))
    with pytest.raises(UserError, match=r"not permitted.*TEST.OPTIMIZE.CUDA_GRAPHS False"):
        backbone(image(6, 1.0))


def test_threads_get_separate_maps(graphed: tuple[GraphedBackbone, FakeGraphs]) -> None:
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
    graphed: tuple[GraphedBackbone, FakeGraphs],
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
    graphed.backbone = GraphedBackbone(graphed.backbone)
    assert graphed.backbone.size_divisibility == 32
    again = pickle.loads(pickle.dumps(graphed))
    for _ in range(3):
        assert_same(detect(again), detect(fast))
    assert not again.backbone._graphs
