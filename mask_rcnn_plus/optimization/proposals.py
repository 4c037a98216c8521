"""The RPN: both predictions in one convolution, and boxes for the best anchors alone."""

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from mask_rcnn_plus.optimization.layers import FusedConv2d, constant


class FusedRPNHead(StandardRPNHead):
    """``StandardRPNHead`` with one 1x1 convolution instead of two, whose results are fp32."""

    both: FusedConv2d
    anchors: int

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As the head's: by level, logits (N, A, H, W) and deltas (N, A * box_dim, H, W)."""
        maps = [self.both.run(self.conv(x), relu=False).float() for x in features]
        return [x[:, : self.anchors] for x in maps], [x[:, self.anchors :] for x in maps]


def fuse_rpn_head(head: nn.Module) -> None:
    """Turns a ``StandardRPNHead`` with converted convolutions, in place, into the fused kind."""
    logits, deltas = head.objectness_logits, head.anchor_deltas
    head.anchors = logits.out_channels
    both = logits
    dtype = both.weight.dtype
    both.weight = constant(torch.cat([logits.weight, deltas.weight]), dtype)
    both.bias = constant(torch.cat([logits.bias, deltas.bias]), dtype)
    both.out_channels = len(both.weight)
    del head.objectness_logits, head.anchor_deltas
    head.both = both
    head.__class__ = FusedRPNHead


class LeanRPN(RPN):
    """``RPN`` that decodes boxes after it has chosen the best anchors of each level, not before.

    Same proposals in the same order. Anchors of equal scores are taken in the order of the map, as
    detectron2's sort leaves them on the CPU.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As the RPN's in evaluation: one ``Instances`` an image, best first, and no losses."""
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        boxes, scores, levels = [], [], []
        for level, (own, score, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            number = score.shape[1]
            count = len(own)
            # The order of anchors: cell by cell, the anchors of one together.
            score = score.permute(0, 2, 3, 1).flatten(1).float()
            best, index = largest(score, min(count, self.pre_nms_topk[False]))
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
        level_of = torch.cat(levels)
        return [
            self._select(size, *pair, level_of)
            for size, *pair in zip(
                images.image_sizes, torch.cat(boxes, 1), torch.cat(scores, 1), strict=True
            )
        ], {}

    def _select(
        self, image_size: tuple[int, int], boxes: Tensor, scores: Tensor, levels: Tensor
    ) -> Instances:
        """The best of an image's candidates after NMS a level, waiting for the device once more
        than NMS does.

        Args:
            image_size: (H, W) in pixels.
            boxes, scores, levels: (R, 4), (R,), (R,).
        """
        valid = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
        kept = Boxes(torch.where(valid[:, None], boxes, 0.0))
        kept.clip(image_size)
        valid &= kept.nonempty(threshold=self.min_box_size)
        # An empty box overlaps nothing, and behind all others it is dropped at the end.
        boxes = torch.where(valid[:, None], kept.tensor, 0.0)
        scores = torch.where(valid, scores, float("-inf"))
        order = batched_nms(boxes, scores, levels, self.nms_thresh)[: self.post_nms_topk[False]]
        order = order[valid[order]]
        return Instances(
            image_size, proposal_boxes=Boxes(boxes[order]), objectness_logits=scores[order]
        )


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row, (N, A) to two of (N, count); of equal ones the first.

    ``topk`` leaves open which of equal scores it takes, and sorting all takes several times longer.
    On a GPU, where what follows would wait for the device, it is ``topk`` alone.
    """
    if scores.device.type != "cpu" or not count:
        return scores.topk(count, dim=1)
    rows = []
    for row in scores:
        least = row.topk(count).values[-1]
        # Not (row < least): a score that is not a number sorts first in topk, as in a sort.
        candidates = (~(row < least)).nonzero()[:, 0]
        best, order = row[candidates].sort(descending=True, stable=True)
        rows.append((best[:count], candidates[order[:count]]))
    best, index = zip(*rows, strict=True)
    return torch.stack(best), torch.stack(index)
