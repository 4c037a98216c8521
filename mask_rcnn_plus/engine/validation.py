"""The training losses on images of the test sets."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from mask_rcnn_plus.data import NamingMapper, PolygonMapper, SafeDatasetMapper
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.engine.freezing import stateful_modules
from mask_rcnn_plus.engine.steps import amp_dtype, autocast

NAME = "validation"
TOTAL = "total_loss"


class ValidationLoss:
    """Measures the losses of a model image by image, without changing the model.

    The result is the mean over images, each in a batch of its own. Norms and dropout work as in
    evaluation. The sampled anchors and RoIs only depend on the image, so two measurements only
    differ because of the weights, whatever the number of processes.

    Args:
        records: data set -> its images, in detectron2's format.
        mapper: converts a record to a sample with ``instances``.
        images: the number of images per data set, evenly spaced; 0 for all.
        amp: the mixed precision, a key of ``AMP_DTYPES``; "" for full precision.
    """

    def __init__(
        self,
        records: Mapping[str, Sequence[dict[str, Any]]],
        mapper: Callable[[dict[str, Any]], Any],
        *,
        images: int = 0,
        amp: str = "",
    ) -> None:
        self._records = records
        self._mapper = mapper
        self._images = images
        self._amp = amp

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The mean of each loss, and of their sum; every process must call it.

        Args:
            model: returns a mapping of losses in training mode; it may be wrapped for distributed
                training.

        Returns:
            for example "validation/loss_cls" -> value, or "validation/NAME/loss_cls" with several
            data sets; the same in all processes.

        Raises:
            UserError: an image cannot be used.
        """
        model = getattr(model, "module", model)
        with _measuring(model):
            return {
                f"{self._prefix(name)}{loss}": value
                for name, records in self._records.items()
                for loss, value in self._means(model, name, records).items()
            }

    def prefix_of(self, metric: str) -> str:
        """The part of a metric's name before the loss, such as "validation/"; "" if none."""
        prefixes = map(self._prefix, self._records)
        return next((prefix for prefix in prefixes if metric.startswith(prefix)), "")

    def _prefix(self, name: str) -> str:
        return f"{NAME}/" if len(self._records) == 1 else f"{NAME}/{name}/"

    def _means(
        self, model: nn.Module, name: str, records: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        indices = _evenly_spaced(len(records), self._images)
        own: dict[int, dict[str, float]] = {}
        for index in indices[comm.get_rank() :: comm.get_world_size()]:
            seed_all(NAME, name, index)
            sample = self._mapper(records[index])
            with autocast(model, self._amp):
                losses = model([sample])
            own[index] = {loss: float(value) for loss, value in losses.items()}
        shares = comm.all_gather(own)
        by_image = {index: losses for share in shares for index, losses in share.items()}
        sums: dict[str, float] = defaultdict(float)
        # In the order of the images, so that rounding does not depend on the number of processes.
        for index in sorted(by_image):
            for loss, value in by_image[index].items():
                sums[loss] += value
            sums[TOTAL] += sum(by_image[index].values())
        return {loss: value / len(by_image) for loss, value in sums.items()}


def build_validation(cfg: CfgNode) -> ValidationLoss:
    """Builds the measurement of the losses on DATASETS.TEST."""
    mapper: Callable[[dict[str, Any]], Any] = SafeDatasetMapper(
        cfg, is_train=True, augmentations=build_augmentation(cfg, False), recompute_boxes=False
    )
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        mapper = PolygonMapper(mapper)
    files = cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else ()
    records = {
        name: get_detection_dataset_dicts(
            name, filter_empty=False, proposal_files=[files[index]] if files else None
        )
        for index, name in enumerate(cfg.DATASETS.TEST)
    }
    return ValidationLoss(
        records, NamingMapper(mapper), images=cfg.TEST.LOSS_IMAGES, amp=amp_dtype(cfg)
    )


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Training mode, except for norms and dropout; afterwards each module is as before."""
    before = {module: _number_attributes(module) for module in model.modules()}
    model.train()
    for _, module in stateful_modules(model):
        module.eval()
    try:
        # A separate storage: the heads' logs must not mix with those of the iteration.
        with torch.no_grad(), EventStorage():
            yield
    finally:
        for module, numbers in before.items():
            for name in _number_attributes(module).keys() - numbers.keys():
                delattr(module, name)
            vars(module).update(numbers)


def _number_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's mode and the numbers outside its buffers (RetinaNet's normalizer)."""
    return {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)}


def _evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` indices below ``total``, the middles of equal parts; all if ``count`` is 0."""
    count = min(count, total) or total
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
