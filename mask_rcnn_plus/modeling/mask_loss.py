"""The loss of a sigmoid mask head, with one wait for the device instead of four."""

import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F


def mask_loss(logits: Tensor, instances: list[Instances], *, vis_period: int = 0) -> Tensor:
    """Binary cross-entropy a pixel of the ground-truth class's mask (Mask R-CNN, section 3).

    The value and the figures of detectron2's ``mask_rcnn_loss``, which asks the device for each of
    them in turn.

    Args:
        logits: (R, K, M, M), or (R, 1, M, M) for class-agnostic masks.
        instances: positives, one ``Instances`` an image, R in all, with ``proposal_boxes`` in
            input-image pixels, ``gt_classes`` and ``gt_masks``.
        vis_period: iterations between two sets of pictures, prediction beside target; 0 for none.

    Returns:
        the loss; 0, with its graph, without RoIs.
    """
    filled = [one for one in instances if len(one)]
    if not filled:
        return logits.sum() * 0
    side, device = logits.shape[-1], logits.device
    # Polygons are drawn on the CPU, which has to know the boxes.
    masks = [one.gt_masks.crop_and_resize(one.proposal_boxes.tensor, side) for one in filled]
    target = torch.cat([mask.to(device) for mask in masks])
    if logits.shape[1] == 1:
        chosen = logits[:, 0]
    else:
        classes = torch.cat([one.gt_classes for one in filled]).long()
        chosen = logits[torch.arange(len(classes), device=device), classes]
    inside = target > 0.5 if target.is_floating_point() else target.bool()
    _log(chosen.detach(), inside, vis_period)
    return F.binary_cross_entropy_with_logits(chosen, target.to(torch.float32))


def _log(logits: Tensor, inside: Tensor, vis_period: int) -> None:
    storage = get_event_storage()
    wrong = (logits > 0) != inside
    counts = [wrong.sum(), inside.sum(), (wrong & ~inside).sum(), (wrong & inside).sum()]
    missed, positive, false_positive, false_negative = torch.stack(counts).tolist()
    pixels = wrong.numel()
    storage.put_scalar("mask_rcnn/accuracy", 1 - missed / max(pixels, 1.0))
    storage.put_scalar("mask_rcnn/false_positive", false_positive / max(pixels - positive, 1.0))
    storage.put_scalar("mask_rcnn/false_negative", false_negative / max(positive, 1.0))
    if vis_period > 0 and storage.iter % vis_period == 0:
        pairs = torch.cat([logits.sigmoid().float(), inside.float()], dim=2)
        for number, pair in enumerate(pairs):
            name = f"Left: mask prediction;   Right: mask GT ({number})"
            storage.put_image(name, pair.expand(3, -1, -1))
