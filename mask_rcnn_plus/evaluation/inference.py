"""Runs a model over a test set and measures the time of each stage and the peak memory.

Unlike in detectron2's ``inference_on_dataset``, masks stay small until an evaluator needs them.
"""

import itertools
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.speed import InferenceSpeed, Stopwatch, combine, peak_memory
from mask_rcnn_plus.evaluation.stages import StageTimer, stage_modules
from mask_rcnn_plus.modeling import postprocess
from mask_rcnn_plus.optimization import OptimizedRCNN

_logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_MAX_WARM_UP = 5

Batch = Sequence[Mapping[str, Any]]


class _Progress:
    """Shows the main process's progress: a bar on a terminal, otherwise a line every 5 seconds."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._main = comm.is_main_process()
        self._last = time.perf_counter()
        self._bar = None
        if self._main and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=name, unit="batch", dynamic_ncols=True)

    def update(self, done: int, watch: Stopwatch) -> None:
        """Shows how many batches are done, and the rate that the watch measured."""
        rate = watch.images * comm.get_world_size() / max(watch.total, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.1f} images/s", refresh=False)
            self._bar.update()
        elif self._main and time.perf_counter() - self._last >= _LOG_SECONDS:
            self._last = time.perf_counter()
            left = (self._total - done) * watch.total / watch.batches
            _logger.info(
                "%s: %d/%d batches, %.1f images/s, ETA %s",
                *(self._name, done, self._total, rate, timedelta(seconds=round(left))),
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run_inference(
    model: Any,
    data_loader: Any,
    evaluator: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
    *,
    dataset_name: str,
) -> tuple[dict[str, Any], InferenceSpeed]:
    """Runs a model over a test set and evaluates its outputs; every process must call it.

    The outputs of a :class:`GeneralizedRCNN` equal those of ``model(batch)``, but post-processing
    is timed separately and ``pred_masks`` is a :class:`mask_rcnn_plus.modeling.PastedMasks`: our
    evaluators use its encoding, other evaluators can iterate over its masks. Any other model is
    called as a whole. The model runs in evaluation mode, without gradients; afterwards each module
    has its previous mode. The rates exclude up to five warm-up batches (at most half of the set).

    Args:
        model: maps a batch of the loader to one mapping per image; may be wrapped for distributed
            training.
        data_loader: this process's share of the images, with a length; may be empty.
        evaluator: None measures only the speed.
        dataset_name: for messages, and to find the file that an error is about.

    Returns:
        the evaluator's results, empty on all processes except the main one; and the speed, the
        same on all processes.

    Raises:
        UserError: an image cannot be read.
        RuntimeError: anything else failed on an image; the message names its file.
    """
    if not isinstance(evaluator, DatasetEvaluator):
        evaluator = DatasetEvaluators(list(evaluator or ()))
    if isinstance(model, DistributedDataParallel):
        # Its forward synchronises buffers, and hangs if the processes have unequal shares.
        model = model.module
    split = can_split(model)
    device = _device_of(model)
    total = len(data_loader)
    warm_up = min(_MAX_WARM_UP, total // 2)
    _logger.info("Evaluating on %s: %d batches on %s", dataset_name, total, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    evaluator.reset()
    watch = Stopwatch(device)
    stages = StageTimer(stage_modules(model) if split else {}, device)
    progress = _Progress(dataset_name, total)
    try:
        # Not inference_mode: tensors that a model caches in it cannot be used for training later.
        with _evaluation_mode(model), torch.no_grad():
            watch.start()
            for index, batch in enumerate(_batches(data_loader, dataset_name)):
                watch.lap("data")
                with _naming_files(batch):
                    if split:
                        with stages.running() as stage_times:
                            raw = model.inference(batch, do_postprocess=False)
                        watch.lap("model")
                        watch.add_model_stages(stage_times)
                        outputs = [_postprocess(*pair) for pair in zip(raw, batch, strict=True)]
                        watch.lap("post")
                    else:
                        outputs = model(batch)
                        watch.lap("model")
                    evaluator.process(batch, outputs)
                watch.lap("evaluation")
                watch.count(len(batch))
                progress.update(index + 1, watch)
                if index + 1 == warm_up:
                    watch.start()
    finally:
        progress.close()
    watch.peak_memory_mib, peak_kind = peak_memory(device)

    comm.synchronize()
    since = time.perf_counter()
    results = evaluator.evaluate() or {}
    watch.scoring_seconds = time.perf_counter() - since
    watches = comm.all_gather(watch)
    return results, combine(watches, split=split, peak_kind=peak_kind, device=device)


def can_split(model: Any) -> bool:
    """Whether the forward equals ``inference`` without post-processing followed by ours."""
    cls = type(model)
    return (
        isinstance(model, GeneralizedRCNN)
        and cls.forward is GeneralizedRCNN.forward
        and (cls.inference is GeneralizedRCNN.inference or isinstance(model, OptimizedRCNN))
        and cls._postprocess is GeneralizedRCNN._postprocess
        # Hooks run only when the model itself is called.
        and not (model._forward_hooks or model._forward_pre_hooks)
    )


def _postprocess(raw: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    height, width = raw.image_size
    size = image.get("height", height), image.get("width", width)
    return {"instances": postprocess(raw, *size)}


def _device_of(model: Any) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            return tensor.device
    return torch.device("cpu")


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode for all modules; afterwards each module has its previous mode."""
    modes = {}
    if isinstance(model, torch.nn.Module):
        modes = {module: module.training for module in model.modules()}
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _naming_files(batch: Batch) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError):  # an OSError names its own file, which an evaluator writes
        raise
    except Exception as error:
        files = " or ".join(str(image.get("file_name", "?")) for image in batch)
        raise RuntimeError(f"failed on {files}: {type(error).__name__}: {error}") from error


def _batches(data_loader: Any, dataset_name: str) -> Iterator[Batch]:
    """The loader's batches; an error in loading a batch names its images."""
    iterator = iter(data_loader)
    for index in itertools.count():
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            files = " or ".join(_files_of_batch(data_loader, dataset_name, index)) or "an image"
            # The message of a worker's error is its traceback; the last line is the error itself.
            reason = ["", *str(error).strip().splitlines()][-1]
            kind = type(error).__name__
            reason = reason if reason.startswith(kind) else f"{kind}: {reason}"
            unreadable = isinstance(error, OSError | SizeMismatchError)
            raise (UserError if unreadable else RuntimeError)(
                f"{dataset_name}: cannot load {files}: {reason}"
            ) from error
        yield batch


def _files_of_batch(data_loader: Any, dataset_name: str, index: int) -> list[str]:
    """The file names of a batch that could not be loaded, as far as they are known."""
    sampler = getattr(data_loader, "batch_sampler", None)
    if sampler is None or dataset_name not in DatasetCatalog:
        return []
    records = DatasetCatalog.get(dataset_name)
    if len(records) != len(data_loader.dataset):
        return []
    chosen: Sequence[int] = next(itertools.islice(sampler, index, None), [])
    return [str(records[i].get("file_name", "?")) for i in chosen]
