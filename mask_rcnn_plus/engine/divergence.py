"""Explains why a loss or a weight stopped being finite, and runs that step again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.steps import AMP_DTYPES
from mask_rcnn_plus.engine.stops import DIVERGED
from mask_rcnn_plus.engine.weights import BadFileError, explain, non_finite, read_torch
from mask_rcnn_plus.errors import UserError

# What a batch may hold besides tensors, numbers and text.
STRUCTURES = (Instances, Boxes, BitMasks, Keypoints, PolygonMasks)

_IMAGES_IN_MESSAGE = 8


class DivergedError(UserError):
    """A loss or a weight is not finite."""

    exit_code = DIVERGED


@dataclass(frozen=True)
class Step:
    """What it takes to repeat the forward pass of a training step.

    Attributes:
        batch: the samples.
        seeds: the arguments with which ``seed_all`` seeded the random generators.
        amp: the type of mixed precision, a key of ``AMP_DTYPES``; "" for none.
    """

    batch: list[Any]
    seeds: tuple[int | str, ...]
    amp: str = ""

    def losses(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The losses of a model that is not wrapped for distributed training."""
        device = next(model.parameters()).device.type
        seed_all(*self.seeds)
        dtype = AMP_DTYPES.get(self.amp)
        with EventStorage(), torch.autocast(device, dtype, enabled=dtype is not None):
            return model(self.batch)


def first_bad(model: torch.nn.Module, step: Step) -> str:
    """Repeats a step and names the first tensor in it that is not finite.

    Args:
        model: in training mode; it may gain gradients and updated BatchNorm statistics.
        step: the step.

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
    with _watching(model, outputs):
        try:
            losses = step.losses(model)
        except FloatingPointError as error:
            # detectron2's region proposals check their boxes themselves.
            return outputs[0] if outputs else str(error)
    if outputs:
        return outputs[0]
    if name := next(non_finite(losses), ""):
        return f"loss {name}"
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    name = next(non_finite(gradients), "")
    return f"gradient of {name}" if name else ""


@contextmanager
def _watching(model: torch.nn.Module, outputs: list[str]) -> Iterator[None]:
    """Within, notes the first module whose output is not finite."""

    def watch(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not outputs and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                outputs.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(watch(n)) for n, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "tensor"):  # ImageList, Boxes
        yield from _tensors(value.tensor)


def report(
    model: torch.nn.Module,
    steps: Sequence[Step],
    *,
    what: str,
    iteration: int,
    learning_rate: float,
    base_lr: float,
    config: str,
    path: Path,
) -> DivergedError:
    """Writes the file that ``replay`` reads, and explains the divergence.

    Args:
        model: the model before the step.
        steps: the step of each process.
        what: what is not finite, for the message.
        iteration: of the step.
        learning_rate: at the step.
        base_lr: SOLVER.BASE_LR.
        config: YAML text.
        path: of the file to write.

    Returns:
        the error to raise.
    """
    what = " ".join(what.split())
    diverged, tensor = steps[0], ""
    # Repeating the step changes BatchNorm's running statistics.
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    for step in steps:
        if tensor := first_bad(model, step):
            diverged = step
            break
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
                "config": config,
            },
            path,
        )
    except saving.SaveError as error:
        where = str(error)
    advice = f"the learning rate was {learning_rate:.3g}: try SOLVER.BASE_LR {base_lr / 10:.3g}"
    if tensor.startswith("image"):
        advice = "check the image and its augmentation"
    return DivergedError(
        f"training diverged at iteration {iteration}: {what}; first tensor that is not finite: "
        f"{tensor or 'none when the step is repeated'}; images {_images(diverged.batch)}; "
        f"{advice}; {where}"
    )


def _images(batch: list[Any]) -> str:
    names = [
        f"{sample.get('image_id', '?')} ('{sample.get('file_name', '?')}')"
        for sample in batch
        if isinstance(sample, Mapping)
    ]
    more = len(names) - _IMAGES_IN_MESSAGE
    return ", ".join(names[:_IMAGES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


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
