"""How ``predict`` draws: lines and text grow with the picture, and a crowd gets less of them."""

import math
from collections.abc import Sequence

from detectron2.structures import Instances

from mask_rcnn_plus.evaluation.drawing import (
    FONT_SCALE,
    DrawnObjects,
    Image,
    Style,
    draw_styled,
)

# With more objects than this, boxes and labels would hide the picture.
_MANY = 30
# The side in pixels, width times height being its square, of a picture with the smallest text.
_SIDE = 800


class Drawing:
    """Draws pictures at their own size.

    Args:
        class_names: in the order of class ids.
        masks, boxes, labels, scores: whether they are drawn; None draws boxes, labels and scores
            where there are 30 objects at most, and masks always.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        masks: bool | None = None,
        boxes: bool | None = None,
        labels: bool | None = None,
        scores: bool | None = None,
    ) -> None:
        self._class_names = class_names
        self._masks, self._boxes, self._labels, self._scores = masks, boxes, labels, scores

    def __call__(self, image: Image, instances: Instances) -> Image:
        """The drawing of a picture, (H, W, 3) in BGR as the picture."""
        objects = DrawnObjects.from_instances(instances)
        crowded = len(objects) > _MANY
        growth = max(0.8, math.sqrt(image.shape[0] * image.shape[1]) / _SIDE)
        style = Style(
            masks=self._masks is not False,
            boxes=_or(self._boxes, not crowded),
            labels=_or(self._labels, not crowded),
            scores=self._scores is not False,
            # Less than in proportion: large pictures are looked at in parts as well.
            line=max(1, round((1 if crowded else 2) * growth**0.6)),
            text=FONT_SCALE * growth**0.75,
            small=True,
            edged=True,
        )
        return draw_styled(image, objects, self._class_names, style)


def _or(given: bool | None, otherwise: bool) -> bool:
    return otherwise if given is None else given
