"""Explains why a loss or a weight stopped being finite, and runs that step again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.steps import autocast
from mask_rcnn_plus.engine.stops import DIVERGED
from mask_rcnn_plus.engine.weights import BadFileError, explain, listed, non_finite, read_torch
from mask_rcnn_plus.errors import UserError

# The classes that a batch may contain besides tensors, numbers and text.
STRUCTURES = (Instances, Boxes, BitMasks, Keypoints, PolygonMasks)


class DivergedError(UserError):
    """A loss or a weight is not finite."""

    exit_code = DIVERGED


@dataclass(frozen=True)
class Step:
    """Everything needed to repeat the forward pass of a training step.

    Attributes:
        batch: the samples.
        seeds: the arguments of ``seed_all`` before the step.
        amp: the mixed precision, a key of ``AMP_DTYPES``; "" for full precision.
    """

    batch: list[Any]
    seeds: tuple[int | str, ...]
    amp: str = ""

    def losses(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The losses of a model that is not wrapped for distributed training."""
        seed_all(*self.seeds)
        with EventStorage(), autocast(model, self.amp):
            return model(self.batch)


def first_bad(model: torch.nn.Module, step: Step) -> str:
    """Repeats a step and names the first tensor in it that is not finite.

    Args:
        model: in training mode; its gradients and BatchNorm statistics may change.
        step: the step to repeat.

    Returns:
        for example "output of backbone.fpn_output2 (Conv2d)"; "" if everything is finite.
    """
    for number, sample in enumerate(step.batch):
        image = sample.get("image") if isinstance(sample, Mapping) else None
        if image is not None and image.is_floating_point() and not torch.isfinite(image).all():
            return f"image number {number + 1} of the batch"
    if name := next(non_finite(dict(model.named_parameters())), ""):
        return f"weights {name}"
    outputs: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not outputs and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
            outputs.append(f"output of {names[module] or 'the model'} ({type(module).__name__})")

    handles = [module.register_forward_hook(watch) for module in names]
    try:
        losses = step.losses(model)
    except FloatingPointError as error:
        # detectron2 checks the boxes of its region proposals.
        return outputs[0] if outputs else str(error)
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return outputs[0]
    if name := next(non_finite(losses), ""):
        return f"loss {name}"
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    name = next(non_finite(gradients), "")
    return f"gradient of {name}" if name else ""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif hasattr(value, "tensor"):  # ImageList, Boxes
        yield from _tensors(value.tensor)


def report(
    model: torch.nn.Module,
    steps: Sequence[Step],
    cfg: CfgNode,
    *,
    what: str,
    iteration: int,
    learning_rate: float,
) -> DivergedError:
    """Writes the file that ``replay`` reads, and returns an error that explains the divergence.

    Args:
        model: the model before the step.
        steps: the step of each process.
        cfg: the config of the run.
        what: the value that is not finite, for the message.
        iteration: the iteration of the step.
        learning_rate: the learning rate of the step.
    """
    path = Path(cfg.OUTPUT_DIR) / f"divergence{comm.get_rank() or ''}.pt"
    what = " ".join(what.split())
    # Copied first, because repeating the step changes BatchNorm's running statistics.
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    tensors = ((step, first_bad(model, step)) for step in steps)
    diverged, tensor = next((pair for pair in tensors if pair[1]), (steps[0], ""))
    where = f"batch, weights and random state are in {path}"
    try:
        saving.save(
            {
                "iteration": iteration,
                "what": what,
                "first_bad": tensor,
                "weights": weights,
                "batch": diverged.batch,
                "seeds": list(diverged.seeds),
                "amp": diverged.amp,
                "config": cfg.dump(),
            },
            path,
        )
    except saving.SaveError as error:
        where = str(error)
    images = [
        f"{sample.get('image_id', '?')} ('{sample.get('file_name', '?')}')"
        for sample in diverged.batch
        if isinstance(sample, Mapping)
    ]
    smaller = cfg.SOLVER.BASE_LR / 10
    advice = f"the learning rate was {learning_rate:.3g}: try SOLVER.BASE_LR {smaller:.3g}"
    if tensor.startswith("image"):
        advice = "check the image and its augmentation"
    return DivergedError(
        f"training diverged at iteration {iteration}: {what}; first tensor that is not finite: "
        f"{tensor or 'none when the step is repeated'}; images {listed(images, 8)}; "
        f"{advice}; {where}"
    )


def replay(
    path: str | Path, model: torch.nn.Module, *, trusted: bool = False
) -> tuple[str, dict[str, float]]:
    """Repeats the step at which a run diverged.

    Args:
        path: the run's ``divergence.pt``. Like weights, it is read without running code in it.
        model: built from the run's config; the weights of the file are loaded into it.
        trusted: read the file as a full pickle, for batches of your own mapper with other classes.

    Returns:
        the first tensor that is not finite, as ``first_bad`` names it, and the losses.

    Raises:
        UserError: the file is damaged, is not a ``divergence.pt``, or names code.
    """
    path = Path(path)
    try:
        if saving.has_digest(path) and (fault := saving.damage(path)):
            raise BadFileError(f"the file {fault}")
        if trusted:
            stored = torch.load(path, map_location="cpu", weights_only=False)
        else:
            stored = read_torch(path, also=STRUCTURES)
        step = Step(stored["batch"], tuple(stored["seeds"]), stored["amp"])
        weights = stored["weights"]
    except Exception as error:
        raise UserError(f"'{path}' cannot be replayed: {explain(error)}") from error
    model.load_state_dict(weights)
    model.train()
    tensor = first_bad(model, step)
    model.load_state_dict(weights)
    try:
        losses = {name: float(value.detach()) for name, value in step.losses(model).items()}
    except FloatingPointError:
        losses = {}
    return tensor, losses
