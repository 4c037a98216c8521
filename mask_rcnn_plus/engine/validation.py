"""The training losses on images that are not trained on."""

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
from mask_rcnn_plus.data.draws import seed_all
from mask_rcnn_plus.engine.freezing import draws_or_counts
from mask_rcnn_plus.engine.steps import AMP_DTYPES, amp_dtype

NAME = "validation"
TOTAL = "total_loss"


class ValidationLoss:
    """Measures the losses of a model image by image, and leaves it as it was.

    The mean over images is that of batches of one image. Norms and dropout work as in evaluation.
    What is drawn (the sample of anchors and RoIs) depends on the image's place alone, so that two
    measurements differ by the weights alone, whatever the number of processes.

    Args:
        records: data set -> its images, in detectron2's format.
        mapper: from a record to a sample with ``instances``.
        images: how many of each data set, evenly spaced; 0 for all.
        amp: in which mixed precision, of ``AMP_DTYPES``; "" for none.
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
            model: one that gives a mapping of losses in training mode; it may be wrapped for
                distributed training.

        Returns:
            as "validation/loss_cls", with several data sets "validation/NAME/loss_cls"; the same in
            all processes.

        Raises:
            UserError: an image cannot be used.
        """
        model = getattr(model, "module", model)
        figures = {}
        with _measuring(model):
            for name, records in self._records.items():
                means = self._means(model, name, records)
                prefix = self._prefix(name)
                figures.update({f"{prefix}{loss}": value for loss, value in means.items()})
        return figures

    def prefix_of(self, figure: str) -> str:
        """What stands before the loss's name in a figure's, as "validation/"; "" if nothing."""
        prefixes = map(self._prefix, self._records)
        return next((prefix for prefix in prefixes if figure.startswith(prefix)), "")

    def _prefix(self, name: str) -> str:
        return f"{NAME}/" if len(self._records) == 1 else f"{NAME}/{name}/"

    def _means(
        self, model: nn.Module, name: str, records: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        places = _spread(len(records), self._images)
        device = next(model.parameters()).device.type
        dtype = AMP_DTYPES.get(self._amp)
        own: dict[int, dict[str, float]] = {}
        for place in places[comm.get_rank() :: comm.get_world_size()]:
            seed_all(NAME, name, place)
            sample = self._mapper(records[place])
            with torch.autocast(device, dtype, enabled=dtype is not None):
                losses = model([sample])
            own[place] = {loss: float(value) for loss, value in losses.items()}
        every = {place: losses for share in comm.all_gather(own) for place, losses in share.items()}
        sums: dict[str, float] = defaultdict(float)
        # In the order of the images, so that the last bit does not depend on who measured which.
        for place in sorted(every):
            for loss, value in every[place].items():
                sums[loss] += value
            sums[TOTAL] += sum(every[place].values())
        return {loss: value / len(every) for loss, value in sums.items()}


def build_validation(cfg: CfgNode) -> ValidationLoss:
    """What measures the losses on DATASETS.TEST as a config says."""
    mapper: Callable[[dict[str, Any]], Any] = SafeDatasetMapper(
        cfg, is_train=True, augmentations=build_augmentation(cfg, False), recompute_boxes=False
    )
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        mapper = PolygonMapper(mapper)
    files = cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else ()
    records = {
        name: get_detection_dataset_dicts(
            name, filter_empty=False, proposal_files=[files[place]] if files else None
        )
        for place, name in enumerate(cfg.DATASETS.TEST)
    }
    return ValidationLoss(
        records,
        NamingMapper(mapper),
        images=cfg.TEST.LOSS_IMAGES,
        amp=amp_dtype(cfg),
    )


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Training mode but for what draws or counts; afterwards each module is as it was."""
    before = {module: _numbers(module) for module in model.modules()}
    model.train()
    for _, module in draws_or_counts(model):
        module.eval()
    try:
        # What the heads log belongs to no iteration.
        with torch.no_grad(), EventStorage():
            yield
    finally:
        for module, numbers in before.items():
            for name in _numbers(module).keys() - numbers.keys():
                delattr(module, name)
            vars(module).update(numbers)


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Its mode, and what it may count outside its buffers (RetinaNet's normalizer)."""
    return {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)}


def _spread(total: int, count: int) -> list[int]:
    """``count`` places evenly spaced over ``total``, the middles of equal parts; 0 is all."""
    count = min(count, total) or total
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
