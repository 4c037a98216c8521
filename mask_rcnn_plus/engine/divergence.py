"""What is known when a loss or a weight stops being a finite number."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage

from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.plain_batch import from_plain, to_plain
from mask_rcnn_plus.engine.plain_pickle import PlainPickleError
from mask_rcnn_plus.engine.steps import AMP_DTYPES
from mask_rcnn_plus.engine.stops import DIVERGED
from mask_rcnn_plus.engine.torch_archive import read_torch
from mask_rcnn_plus.errors import UserError

_IMAGES_IN_MESSAGE = 8


class DivergedError(UserError):
    """A loss or a weight is not finite."""

    exit_code = DIVERGED


@dataclass(frozen=True)
class Step:
    """What it takes to do a training step's forward pass again.

    Attributes:
        batch: the samples.
        words: what the random generators were seeded with.
        amp: in which mixed precision, of ``AMP_DTYPES``; "" for none.
    """

    batch: list[Any]
    words: tuple[int | str, ...]
    amp: str = ""

    def losses(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The losses, of a model that is not wrapped for distributed training."""
        device = next(model.parameters()).device.type
        seed_all(*self.words)
        dtype = AMP_DTYPES.get(self.amp)
        with EventStorage(), torch.autocast(device, dtype, enabled=dtype is not None):
            return model(self.batch)


def first_bad(model: torch.nn.Module, step: Step) -> str:
    """Does a step again and names the first tensor in it that is not finite.

    Args:
        model: in training mode; it may gain gradients, and its BatchNorm another batch.
        step: the step.

    Returns:
        as "output of backbone.fpn_output2 (Conv2d)"; "" where all is finite.
    """
    for number, sample in enumerate(step.batch):
        image = sample.get("image") if isinstance(sample, Mapping) else None
        if image is not None and image.is_floating_point() and not torch.isfinite(image).all():
            return f"image number {number + 1} of the batch"
    if name := saving.first_not_finite(dict(model.named_parameters())):
        return f"weights {name}"
    found: list[str] = []
    with _watching(model, found):
        try:
            losses = step.losses(model)
        except FloatingPointError as error:
            # detectron2's region proposals look at their boxes themselves.
            return found[0] if found else str(error)
    if found:
        return found[0]
    if name := saving.first_not_finite(losses):
        return f"loss {name}"
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    name = saving.first_not_finite(gradients)
    return f"gradient of {name}" if name else ""


@contextmanager
def _watching(model: torch.nn.Module, found: list[str]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(f"output of {name or 'the model'} ({type(module).__name__})")

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
    """Writes the reproduction file and says what is known.

    Args:
        model: as it was before the step.
        steps: of each process.
        what: is not finite, for the message.
        iteration: of the step.
        learning_rate: at the step.
        base_lr: SOLVER.BASE_LR.
        config: YAML text.
        path: of the file to write: what ``replay`` takes.

    Returns:
        the error to raise.
    """
    what = " ".join(what.split())
    guilty, tensor = steps[0], ""
    # Running the step again changes BatchNorm's running statistics.
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    for step in steps:
        if tensor := first_bad(model, step):
            guilty = step
            break
    where = f"batch, weights and random state are in {path}"
    try:
        saving.save(
            {
                "iteration": iteration,
                "what": what,
                "first_bad": tensor,
                "weights": weights,
                "batch": to_plain(guilty.batch),
                "words": list(guilty.words),
                "amp": guilty.amp,
                "config": config,
            },
            path,
        )
    except saving.SaveError as error:
        where = str(error)
    advice = f"the learning rate was {learning_rate:.3g}: try SOLVER.BASE_LR {base_lr / 10:.3g}"
    if tensor.startswith("image"):
        advice = "mend the image, or what augments it"
    return DivergedError(
        f"training diverged at iteration {iteration}: {what}; first tensor that is not finite: "
        f"{tensor or 'none when the step is done again'}; images {_images(guilty.batch)}; "
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
    """Does again the step at which a run diverged.

    Args:
        path: the run's ``divergence.pt``, read as weights are: it runs nothing.
        model: built from its config; it gets its weights.
        trusted: read it as a full pickle, for batches of a mapper of your own with other classes.

    Returns:
        the first tensor that is not finite, as ``first_bad`` names it, and the losses.

    Raises:
        UserError: it is no such file, is damaged, or names code.
    """
    path = Path(path)
    try:
        if saving.has_digest(path) and (fault := saving.damage(path)):
            raise PlainPickleError(f"it {fault}")
        if trusted:
            stored = torch.load(path, map_location="cpu", weights_only=False)
        else:
            stored = read_torch(path)
        stored = {**stored, "batch": from_plain(stored["batch"])}
    except Exception as error:
        kind = "" if isinstance(error, PlainPickleError) else f"{type(error).__name__} "
        raise UserError(f"'{path}' is no batch that can be done again: {kind}{error}") from error
    step = Step(stored["batch"], tuple(stored["words"]), stored["amp"])
    model.load_state_dict(stored["weights"])
    model.train()
    tensor = first_bad(model, step)
    model.load_state_dict(stored["weights"])
    try:
        losses = {name: float(value.detach()) for name, value in step.losses(model).items()}
    except FloatingPointError:
        losses = {}
    return tensor, losses
