"""ResNet's blocks and the FPN, in fewer passes over their maps."""

from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.optimization.layers import FusedConv2d


def _is_bare(conv: nn.Module) -> bool:
    return isinstance(conv, FusedConv2d) and conv.is_bare


class FusedBlock(nn.Module):
    """A residual block: each convolution in one pass with what follows it.

    The residual is added in place to the shortcut. Without a convolution there, that is the block's
    input, which may be overwritten unless others read it: the first convolution has read it before.
    """

    def __init__(self, block: BasicBlock | BottleneckBlock, *, first: bool) -> None:
        """
        Args:
            block: whose converted convolutions this block uses; it must fit (:meth:`fits`).
            first: whether it is the first block of its stage, so that others may read its input.
        """
        super().__init__()
        for name, conv in block.named_children():
            self.add_module(name, conv)
        self.shortcut = block.shortcut
        self.convs = [getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        self.overwrites_input = not first

    @staticmethod
    def fits(block: BasicBlock | BottleneckBlock) -> bool:
        """Whether all norms of a block with converted convolutions were folded."""
        return all(_is_bare(conv) for conv in block.children())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H / stride, W / stride)."""
        if self.shortcut is not None:
            rest = self.shortcut.run(x, relu=False)
        else:
            rest = x if self.overwrites_input else x.clone()
        *inner, last = self.convs
        for conv in inner:
            x = conv.run(x, relu=True)
        return last.run(x, relu=True, plus=rest)


class FusedStem(nn.Module):
    """ResNet's stem: the 7x7 convolution and its ReLU in one pass, then the pooling."""

    def __init__(self, stem: BasicStem) -> None:
        """Uses the converted convolution of ``stem``, which must fit (:meth:`fits`)."""
        super().__init__()
        self.conv1 = stem.conv1

    @staticmethod
    def fits(stem: BasicStem) -> bool:
        """Whether the norm was folded."""
        return _is_bare(stem.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C, H / 4, W / 4)."""
        x = self.conv1.run(x, relu=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedFPN(Backbone):
    """An FPN whose lateral convolutions add themselves to the upsampled coarser level."""

    def __init__(self, fpn: FPN) -> None:
        """Uses the parts of ``fpn``, which must fit (:meth:`fits`)."""
        super().__init__()
        for name, part in fpn.named_children():
            self.add_module(name, part)
        self.top_block = fpn.top_block
        self.in_features = fpn.in_features
        # Coarsest first, as in detectron2.
        self.lateral_convs, self.output_convs = fpn.lateral_convs, fpn.output_convs
        shapes = fpn.output_shape()
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self._size_divisibility = fpn.size_divisibility
        self._padding_constraints = getattr(fpn, "padding_constraints", {})

    @staticmethod
    def fits(fpn: FPN) -> bool:
        """Whether it sums its levels and its lateral norms were folded."""
        return fpn._fuse_type == "sum" and all(
            _is_bare(conv) and not conv.relu for conv in fpn.lateral_convs
        )

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Read by detectron2's main branch."""
        return self._padding_constraints

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) to (N, out_channels, Hl, Wl) by level, finest first."""
        below = self.bottom_up(x)
        levels: list[Tensor] = []
        inner: Tensor | None = None
        for name, lateral, output in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs, strict=True
        ):
            if inner is None:
                inner = lateral.run(below[name], relu=False)
            else:
                upsampled = F.interpolate(inner, scale_factor=2.0, mode="nearest")
                inner = lateral.run(below[name], relu=False, plus=upsampled)
            levels.insert(0, output(inner))
        if self.top_block is not None:
            source = self.top_block.in_feature
            named = dict(zip(self._out_features, levels, strict=False))
            levels.extend(self.top_block(below[source] if source in below else named[source]))
        return dict(zip(self._out_features, levels, strict=True))
