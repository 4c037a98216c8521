"""The RoIAlign benchmark's case: feature pyramids, boxes, and the sides that pool them."""

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from mask_rcnn_plus.modeling import FusedROIPooler
from mask_rcnn_plus.ops.fallback import assign_levels

Pooler = Callable[[list[Tensor], list[Boxes]], Tensor]

HEIGHT, WIDTH = 800, 1333  # of the image, whose maps are padded to a multiple of 32
STRIDES = (4, 8, 16, 32)
SCALES = [1 / stride for stride in STRIDES]
SMALLEST, LARGEST = 16, 800  # pixels


def make_pyramid(channels: int, seed: int, device: str) -> list[Tensor]:
    """Normally distributed maps P2 to P5 of one image, fp32 (1, channels, Hl, Wl)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, channels, -(-HEIGHT // 32) * 32 // s, -(-WIDTH // 32) * 32 // s) for s in STRIDES]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def make_boxes(count: int, seed: int, device: str) -> Boxes:
    """Boxes anywhere within the image.

    The square root of the area is spread evenly in the logarithm from 16 to 800 pixels, and so is
    width / height from 1:2 to 2:1; what would be larger than the image is cut to it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    side = SMALLEST * (LARGEST / SMALLEST) ** uniform()
    stretch = 2 ** (uniform() - 0.5)  # the root of width / height
    width = (side * stretch).clamp(max=WIDTH - 1)
    height = (side / stretch).clamp(max=HEIGHT - 1)
    x, y = uniform() * (WIDTH - width), uniform() * (HEIGHT - height)
    return Boxes(torch.stack([x, y, x + width, y + height], dim=1).to(device))


def make_poolers(bins: int, ratio: int) -> dict[str, Pooler]:
    """The three sides, each from maps and boxes to (R, C, bins, bins).

    Args:
        bins: of the output, in each axis.
        ratio: samples a bin and axis; 0 adapts to the box.
    """
    settings = (bins, SCALES, ratio, "ROIAlignV2")
    return {
        "ours": FusedROIPooler(*settings),
        "detectron2": ROIPooler(*settings),
        "torchvision": _each_level(bins, ratio),
    }


def _each_level(bins: int, ratio: int) -> Pooler:
    """torchvision's operator level by level, with as little around it as there can be."""

    def pool(maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        rows = torch.nn.functional.pad(boxes[0].tensor, (1, 0))
        levels = assign_levels(rows, len(maps), 2, 224, 4)
        out = maps[0].new_empty((len(rows), maps[0].shape[1], bins, bins))
        for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
            chosen = (levels == level).nonzero()[:, 0]
            part = rows[chosen].to(feature.dtype)
            pooled = torchvision_roi_align(feature, part, bins, scale, ratio, True)
            out = out.index_put((chosen,), pooled)
        return out

    return pool


def exact(
    maps: Sequence[Tensor], boxes: Boxes, grad: Tensor, bins: int, ratio: int
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in fp64, by torchvision, which shares no code with ours.

    Args:
        maps: as the sides get them; any dtype.
        boxes: R boxes.
        grad: (R, C, bins, bins), the output's gradient.
        bins: of the output, in each axis.
        ratio: samples a bin and axis; 0 adapts to the box.

    Returns:
        the output and the gradient of each map, fp64.
    """
    wide = [m.detach().double().contiguous().requires_grad_() for m in maps]
    out = _each_level(bins, ratio)(wide, [boxes])
    return out.detach(), list(torch.autograd.grad(out, wide, grad.double()))


def touched_cells(boxes: Boxes, bins: int, ratio: int) -> int:
    """How many cells of the maps, of all levels, have a part in the output."""
    device = boxes.tensor.device.type
    maps = [torch.ones_like(m).requires_grad_() for m in make_pyramid(1, 0, device)]
    out = FusedROIPooler(bins, SCALES, ratio, "ROIAlignV2")(maps, [boxes])
    return sum(int(g.count_nonzero()) for g in torch.autograd.grad(out.sum(), maps))
