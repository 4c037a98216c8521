"""ResNet's blocks and the FPN in fewer passes over their maps."""

from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.optimization.layers import FusedConv2d


def is_bare(conv: nn.Module | None) -> bool:
    """Whether a converted convolution has no norm and no activation left behind it."""
    return (
        type(conv) is FusedConv2d
        and getattr(conv, "norm", None) is None
        and getattr(conv, "activation", None) is None
    )


class FusedBottleneckBlock(BottleneckBlock):
    """1x1, 3x3, 1x1 convolutions, each with what follows it in one pass."""

    overwrites: bool

    def forward(self, x: Tensor) -> Tensor:
        """As the block's; see :func:`_shortcut` for what may happen to ``x``."""
        rest = _shortcut(self, x)
        x = self.conv1.run(x, relu=True)
        x = self.conv2.run(x, relu=True)
        return self.conv3.run(x, relu=True, plus=rest)


class FusedBasicBlock(BasicBlock):
    """Two 3x3 convolutions, each with what follows it in one pass."""

    overwrites: bool

    def forward(self, x: Tensor) -> Tensor:
        """As the block's; see :func:`_shortcut` for what may happen to ``x``."""
        rest = _shortcut(self, x)
        x = self.conv1.run(x, relu=True)
        return self.conv2.run(x, relu=True, plus=rest)


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    """What the residual is added to, in its memory.

    That is the block's input itself where the block before it in the same stage made it, since
    nobody else reads that; it is read by the first convolution before anything is written.
    """
    if block.shortcut is not None:
        return block.shortcut.run(x, relu=False)
    return x if block.overwrites else x.clone()


def fuse_block(block: nn.Module, *, first: bool) -> bool:
    """Turns a block of a ResNet, in place, into its fused kind, if all its norms were folded.

    Args:
        block: with converted convolutions.
        first: whether it is the first of its stage, whose input others may read.
    """
    names = ["conv1", "conv2", *(["conv3"] if type(block) is BottleneckBlock else [])]
    convs = [getattr(block, name) for name in names]
    if block.shortcut is not None:
        convs.append(block.shortcut)
    if not all(is_bare(conv) for conv in convs):
        return False
    block.__class__ = FusedBottleneckBlock if type(block) is BottleneckBlock else FusedBasicBlock
    block.overwrites = not first
    return True


class FusedStem(BasicStem):
    """The 7x7 convolution and its ReLU in one pass, then the pooling."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1.run(x, relu=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedFPN(FPN):
    """Each level's lateral convolution adds itself to the upsampled coarser level."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As the FPN's: (N, C, H, W) to (N, out_channels, Hl, Wl) by level, finest first."""
        below = self.bottom_up(x)
        levels: list[Tensor] = []
        inner: Tensor | None = None
        # detectron2 keeps its convolutions coarsest first.
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


def fuse_fpn(fpn: nn.Module) -> bool:
    """Turns an FPN, in place, into the fused kind, if it sums and its norms were folded."""
    laterals = all(is_bare(conv) and not conv.relu for conv in fpn.lateral_convs)
    if fpn._fuse_type != "sum" or not laterals:
        return False
    fpn.__class__ = FusedFPN
    return True
