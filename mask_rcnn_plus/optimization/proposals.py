"""The RPN: both predictions in one convolution, and boxes of the best anchors only."""

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from mask_rcnn_plus.optimization.layers import constant


class FusedRPNHead(nn.Module):
    """``StandardRPNHead`` with one 1x1 convolution instead of two, whose results are fp32."""

    def __init__(self, head: StandardRPNHead) -> None:
        """Uses the converted convolutions of ``head``, and changes them."""
        super().__init__()
        logits, deltas = head.objectness_logits, head.anchor_deltas
        self.conv, self.anchors = head.conv, logits.out_channels
        self.both = logits
        dtype = logits.weight.dtype
        self.both.weight = constant(torch.cat([logits.weight, deltas.weight]), dtype)
        self.both.bias = constant(torch.cat([logits.bias, deltas.bias]), dtype)
        self.both.out_channels = len(self.both.weight)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps (N, C, H, W) to L logits (N, A, H, W) and L deltas (N, A * box_dim, H, W)."""
        maps = [self.both.run(self.conv(x), relu=False).float() for x in features]
        return [x[:, : self.anchors] for x in maps], [x[:, self.anchors :] for x in maps]


class LeanRPN(nn.Module):
    """``RPN`` that decodes boxes after choosing the best anchors of each level, not before.

    It returns the same proposals in the same order. Anchors with equal scores keep their order in
    the map, as in detectron2's sort on the CPU.
    """

    def __init__(self, rpn: RPN) -> None:
        """Uses the head, the anchors and the test settings of ``rpn``."""
        super().__init__()
        self.in_features, self.rpn_head = rpn.in_features, rpn.rpn_head
        self.anchor_generator = rpn.anchor_generator
        self.box2box_transform = rpn.box2box_transform
        self.pre_nms_topk, self.post_nms_topk = rpn.pre_nms_topk, rpn.post_nms_topk
        self.nms_thresh, self.min_box_size = rpn.nms_thresh, rpn.min_box_size

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``RPN`` in evaluation: one ``Instances`` per image, best first, and no losses."""
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        boxes, scores, levels = [], [], []
        for level, (own, score, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            number = score.shape[1]
            # Anchors are ordered cell by cell, then by their number in the cell.
            score = score.permute(0, 2, 3, 1).flatten(1).float()
            best, index = largest(score, min(len(own), self.pre_nms_topk[False]))
            cells = delta.permute(0, 2, 3, 1).reshape(len(score), -1, 4 * number)
            image = torch.arange(len(score), device=score.device)[:, None]
            cells = cells[image, torch.div(index, number, rounding_mode="floor")]
            cells = cells.unflatten(-1, (number, 4))
            pick = (index % number)[..., None, None].expand(-1, -1, 1, 4)
            chosen = cells.gather(2, pick).reshape(-1, 4)
            decoded = self.box2box_transform.apply_deltas(chosen, own.tensor[index.flatten()])
            boxes.append(decoded.view(len(score), -1, 4))
            scores.append(best)
            levels.append(torch.full_like(index[0], level))
        level_index = torch.cat(levels)
        return [
            self._select(size, *pair, level_index)
            for size, *pair in zip(
                images.image_sizes, torch.cat(boxes, 1), torch.cat(scores, 1), strict=True
            )
        ], {}

    def _select(
        self, image_size: tuple[int, int], boxes: Tensor, scores: Tensor, levels: Tensor
    ) -> Instances:
        """The best of an image's R candidates after NMS in each level.

        It waits for the device once more than NMS does.
        """
        valid = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
        kept = Boxes(torch.where(valid[:, None], boxes, 0.0))
        kept.clip(image_size)
        valid &= kept.nonempty(threshold=self.min_box_size)
        # Invalid boxes become empty, so they overlap nothing; sorted last, they are dropped below.
        boxes = torch.where(valid[:, None], kept.tensor, 0.0)
        scores = torch.where(valid, scores, float("-inf"))
        order = batched_nms(boxes, scores, levels, self.nms_thresh)[: self.post_nms_topk[False]]
        order = order[valid[order]]
        return Instances(
            image_size, proposal_boxes=Boxes(boxes[order]), objectness_logits=scores[order]
        )


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest scores of each row and their positions; the first among equal scores.

    ``topk`` may choose any of equal scores, and sorting everything takes several times longer. On a
    GPU, this is only ``topk``, since the rest would wait for the device.

    Args:
        scores: (N, A).
        count: at most A.

    Returns:
        two tensors (N, count).
    """
    if scores.device.type != "cpu" or not count:
        return scores.topk(count, dim=1)
    rows = []
    for row in scores:
        least = row.topk(count).values[-1]
        # Not (row >= least): NaN sorts first in topk, as in a sort.
        candidates = (~(row < least)).nonzero()[:, 0]
        best, order = row[candidates].sort(descending=True, stable=True)
        rows.append((best[:count], candidates[order[:count]]))
    best, index = zip(*rows, strict=True)
    return torch.stack(best), torch.stack(index)
