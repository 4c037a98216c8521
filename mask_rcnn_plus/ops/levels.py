"""Which pyramid level a box belongs to, for operators that do not find out themselves."""

import torch
from torch import Tensor


def assign_levels(
    rows: Tensor, levels: int, min_level: int, canonical_box_size: float, canonical_level: int
) -> Tensor:
    """The level of each box (FPN, equation 1, with detectron2's rounding).

    Args:
        rows: (R, 5), in input-image pixels.
        levels: how many maps there are.
        min_level: the number of the first.
        canonical_box_size: side, in pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level's number.

    Returns:
        (R,) int64 in [0, levels).
    """
    area = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
    side = area.clamp(min=0).nan_to_num(0.0).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_box_size + 1e-8))
    return (level - min_level).clamp(0, levels - 1).long()
