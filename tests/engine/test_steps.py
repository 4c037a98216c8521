"""A training step: mixed precision, gradient accumulation, optimizers."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.solver import build_optimizer as build_stock_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from mask_rcnn_plus.engine.optimizer import build_optimizer
from mask_rcnn_plus.engine.steps import Steps
from tests.modeling.models import batch, build, config


class Line(nn.Module):
    """Learns y = w x; the losses are means over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.sizes: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        self.sizes.append(len(samples))
        x = torch.stack([x for x, _ in samples])
        out = self.layer(x)
        self.dtypes.add(out.dtype)
        y = torch.stack([y for _, y in samples])
        return {"square": (out - y).square().mean(), "size": out.abs().mean() * 0.1}


def samples(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(3, generator=generator), torch.ones(1) * i) for i in range(count)]


def run(kind: type, steps: int = 3, **options: Any) -> tuple[Line, dict]:
    torch.manual_seed(0)
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = kind(model, [samples(6)] * steps, optimizer, **options)
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            trainer.run_step()
    return model, {name: value for name, (value, _) in storage.latest().items()}


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def test_a_plain_step_equals_detectron2s_bit_for_bit() -> None:
    theirs, their_metrics = run(SimpleTrainer)
    ours, our_metrics = run(Steps)
    assert weights(ours) == weights(theirs)
    for metrics in (our_metrics, their_metrics):
        del metrics["data_time"]
    assert our_metrics == their_metrics


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_without_random_draws_parts_equal_the_whole_batch(parts: int) -> None:
    whole, whole_metrics = run(Steps)
    cut, metrics = run(Steps, parts=parts)
    assert cut.sizes == [6 // parts] * parts * 3
    assert weights(cut) == pytest.approx(weights(whole), rel=1e-5)
    assert metrics["total_loss"] == pytest.approx(whole_metrics["total_loss"], rel=1e-5)
    assert metrics["square"] == pytest.approx(whole_metrics["square"], rel=1e-5)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    exact, _ = run(Steps)
    model, _ = run(Steps, amp="bf16")
    assert model.dtypes == {torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert weights(model) != weights(exact)
    assert weights(model) == pytest.approx(weights(exact), rel=0.05, abs=0.02)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_a_run_resumes_with_another_kernel_and_a_gradient_scaler(
    kind: type[torch.optim.Optimizer], before: bool | None, after: bool | None
) -> None:
    def trainer(fused: bool | None) -> Steps:
        torch.manual_seed(0)
        model = Line()
        optimizer = kind(model.parameters(), lr=0.01, fused=fused)
        steps = Steps(model, [samples(6)] * 4, optimizer, amp="fp16")
        # The usual initial scale is too large for this model: its first steps would be skipped.
        steps.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return steps

    first, second, whole = trainer(before), trainer(after), trainer(before)
    with EventStorage():
        first.run_step()
        second.model.load_state_dict(first.model.state_dict())
        second.iter = 0
        second.load_state_dict(deepcopy(first.state_dict()))
        second.run_step()
        for _ in range(2):
            whole.run_step()
    assert second.optimizer.param_groups[0]["fused"] is after
    assert weights(second.model) == pytest.approx(weights(whole.model), rel=1e-4)
    assert weights(first.model) != pytest.approx(weights(whole.model), rel=1e-4)


def test_a_whole_model_with_our_operators_trains_in_bf16() -> None:
    losses = []
    for amp in ("", "bf16"):
        model = build("fpn", ours=True)
        pooled: list[torch.Tensor] = []
        model.roi_heads.box_pooler.register_forward_hook(
            lambda m, a, out, to=pooled: to.append(out)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        trainer = Steps(model, [batch()], optimizer, amp=amp)
        torch.manual_seed(0)
        with EventStorage() as storage:
            trainer.iter = 0
            trainer.run_step()
        losses.append(storage.latest()["total_loss"][0])
        assert pooled[0].dtype == (torch.bfloat16 if amp else torch.float32)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


@pytest.mark.parametrize("fused", [False, True])
def test_sgd_equals_detectron2s(fused: bool) -> None:
    cfg = config("fpn")
    cfg.defrost()
    cfg.SOLVER.BIAS_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_BIAS = 2.0, 0.5
    cfg.SOLVER.FUSED = fused
    results = []
    for builder in (build_stock_optimizer, build_optimizer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(3, 3))
        optimizer = builder(cfg, model)
        for number in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach() * 0.3 + number
            optimizer.step()
        results.append((weights(model), [len(g["params"]) for g in optimizer.param_groups]))
    assert results[1][1] == results[0][1]
    if fused:
        assert all(group["fused"] for group in optimizer.param_groups)
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    else:
        assert results[1][0] == results[0][0]
