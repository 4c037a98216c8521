"""Builds the training and test batches of a config."""

import logging
from collections.abc import Callable, Collection, Sequence, Sized
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from mask_rcnn_plus.data.augmentation import build_augmentations, moves_edges
from mask_rcnn_plus.data.batches import Batches
from mask_rcnn_plus.data.copy_paste import CopyPaste
from mask_rcnn_plus.data.mapper import NamingMapper, PolygonMapper, SafeDatasetMapper
from mask_rcnn_plus.data.sampling import BatchIndices, SampleOrder, Samples
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)


def build_test_batches(cfg: CfgNode, name: str) -> DataLoader:
    """detectron2's loader of a test set, for images of the supported formats."""
    proposals = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST if cfg.MODEL.LOAD_PROPOSALS else None
    # Not from the config: with keypoints, that needs the training sets' metadata, to mirror images.
    mapper = SafeDatasetMapper(
        is_train=False,
        augmentations=build_augmentation(cfg, False),
        image_format=cfg.INPUT.FORMAT,
        precomputed_proposal_topk=proposals,
    )
    return build_detection_test_loader(cfg, name, mapper=mapper)


def leave_out(loader: DataLoader, name: str, done: Collection[Any]) -> DataLoader | None:
    """A copy of a test loader without some of its images.

    Args:
        loader: from :func:`build_test_batches`.
        name: its data set.
        done: the ids of the images to leave out.

    Returns:
        None if the loader does not tell which images it has.
    """
    records: list[dict[str, Any]] = DatasetCatalog.get(name)
    data, batches = loader.dataset, loader.batch_sampler
    known = isinstance(data, Sized) and len(data) == len(records)
    if not known or not isinstance(batches, BatchSampler):
        return None
    return DataLoader(
        data,
        batch_size=batches.batch_size,
        sampler=[i for i in batches.sampler if records[i].get("image_id") not in done],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )


def build_train_mapper(cfg: CfgNode) -> NamingMapper:
    """detectron2's mapper with this project's augmentations.

    Copy-paste cuts holes into masks, which polygons cannot represent. With it, masks are bitmaps,
    whatever INPUT.MASK_FORMAT is.
    """
    mask_format = "bitmask" if cfg.INPUT.COPY_PASTE.PROB > 0 else cfg.INPUT.MASK_FORMAT
    mapper: Callable[[dict[str, Any]], Any] = SafeDatasetMapper(
        cfg,
        is_train=True,
        augmentations=build_augmentations(cfg),
        recompute_boxes=cfg.MODEL.MASK_ON and moves_edges(cfg),
        instance_mask_format=mask_format,
    )
    if cfg.MODEL.MASK_ON and mask_format == "polygon":
        mapper = PolygonMapper(mapper)
    return NamingMapper(mapper)


def build_train_batches(
    cfg: CfgNode, mapper: Callable[[dict[str, Any]], Any], *, seed: int
) -> Batches:
    """The batches of this process. Unlike those of detectron2, they can begin at any iteration.

    Args:
        cfg: DATASETS, DATALOADER, SOLVER.IMS_PER_BATCH and INPUT.COPY_PASTE are used.
        mapper: makes a sample from a record.
        seed: determines the order of the images and all draws; 0 or more, the same in all
            processes.

    Raises:
        UserError: DATALOADER.SAMPLER_TRAIN or a data set cannot be resumed at a position.
    """
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if isinstance(records, IterableDataset):
        raise UserError(
            f"data set {cfg.DATASETS.TRAIN} is a torch IterableDataset, which a resumed run cannot "
            "continue: register a list, or a Dataset with a length"
        )
    order = _build_order(cfg, records, seed)
    loader, pasting = cfg.DATALOADER, cfg.INPUT.COPY_PASTE
    indices = BatchIndices(
        order,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        portrait=_portrait(records) if loader.ASPECT_RATIO_GROUPING else None,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    if isinstance(records, list):
        records = DatasetFromList(records, copy=False)
    copy_paste = CopyPaste(probability=pasting.PROB, max_objects=pasting.MAX_OBJECTS)
    samples = Samples(
        records,
        mapper,
        order,
        max_bad=loader.MAX_BAD_SAMPLES,
        copy_paste=copy_paste if pasting.PROB > 0 else None,
    )
    return Batches(
        samples,
        indices,
        num_workers=loader.NUM_WORKERS,
        timeout=loader.TIMEOUT,
        max_bad=loader.MAX_BAD_SAMPLES,
        rank=comm.get_rank(),
    )


def _build_order(cfg: CfgNode, records: Sequence[dict[str, Any]], seed: int) -> SampleOrder:
    loader = cfg.DATALOADER
    sampler = loader.SAMPLER_TRAIN
    logger.info(f"{len(records)} training images in the order of {sampler}, seed {seed}")
    if sampler == "TrainingSampler":
        return SampleOrder(len(records), seed=seed)
    if sampler == "RandomSubsetTrainingSampler":
        return SampleOrder(len(records), seed=seed, subset_ratio=loader.RANDOM_SUBSET_RATIO)
    if sampler == "RepeatFactorTrainingSampler":
        # detectron2's main branch has two formulas; 0.6 has only the default.
        options = {} if loader.get("REPEAT_SQRT", True) else {"sqrt": False}
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, loader.REPEAT_THRESHOLD, **options
        ).tolist()
        _log_factors(factors, loader.REPEAT_THRESHOLD)
        return SampleOrder(len(records), seed=seed, repeat_factors=factors)
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN is '{sampler}', which a resumed run cannot "
        "continue: set TrainingSampler, RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def _log_factors(factors: list[float], threshold: float) -> None:
    if max(factors) == 1:
        logger.warning(
            f"RepeatFactorTrainingSampler repeats no image: DATALOADER.REPEAT_THRESHOLD is "
            f"{threshold:g}, and every class occurs in at least this share of the images; set a "
            "larger one"
        )
        return
    repeated = sum(factor > 1 for factor in factors)
    logger.info(
        f"An epoch has {sum(factors):.0f} images on average: {repeated} of {len(factors)} occur "
        f"more than once, at most {max(factors):.1f} times"
    )


def _portrait(records: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """For each image, whether it is at least as high as wide; None if sizes are missing."""
    each = (records[index] for index in range(len(records)))
    sizes: list[tuple[Any, Any]] = [(r.get("width"), r.get("height")) for r in each]
    if any(None in size for size in sizes):
        logger.warning(
            "DATALOADER.ASPECT_RATIO_GROUPING has no effect: 'width' or 'height' is missing in "
            "some records"
        )
        return None
    return np.array([width <= height for width, height in sizes], dtype=bool)
