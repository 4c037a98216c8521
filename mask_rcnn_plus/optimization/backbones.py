"""ResNet's blocks and the FPN, in fewer passes over their maps."""

from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.optimization.layers import FusedConv2d


def is_bare(*layers: nn.Module) -> bool:
    """Whether all layers are converted convolutions without a norm or activation behind them."""
    return all(isinstance(layer, FusedConv2d) and layer.is_bare for layer in layers)


class FusedBlock(nn.Module):
    """A residual block: each convolution in one pass with what follows it.

    The residual is added in place to the shortcut. Without a convolution there, that is the block's
    input, which may be overwritten unless others read it: the first convolution has read it before.
    """

    def __init__(self, block: BasicBlock | BottleneckBlock, *, first: bool) -> None:
        """
        Args:
            block: its converted convolutions are used here, and must be bare (:func:`is_bare`).
            first: whether it is the first block of its stage, so that others may read its input.
        """
        super().__init__()
        for name, conv in block.named_children():
            self.add_module(name, conv)
        self.shortcut = block.shortcut
        self.convs = [getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        self.overwrites_input = not first

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
        """Uses the converted convolution of ``stem``, which must be bare (:func:`is_bare`)."""
        super().__init__()
        self.conv1 = stem.conv1

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C, H / 4, W / 4)."""
        x = self.conv1.run(x, relu=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedFPN(FPN):
    """An FPN whose lateral convolutions add themselves to the upsampled coarser level."""

    def __init__(self, fpn: FPN) -> None:
        """Takes over the attributes of ``fpn``, which must fit (:meth:`fits`)."""
        nn.Module.__init__(self)
        self.__setstate__(vars(fpn))

    @staticmethod
    def fits(fpn: FPN) -> bool:
        """Whether it sums its levels and its lateral norms were folded."""
        laterals = fpn.lateral_convs
        return (
            fpn._fuse_type == "sum"
            and is_bare(*laterals)
            and not any(conv.relu for conv in laterals)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) to (N, out_channels, Hl, Wl) by level, finest first."""
        below = self.bottom_up(x)
        levels: list[Tensor] = []
        inner: Tensor | None = None
        upsampled: Tensor | None = None
        # detectron2 lists the convolutions coarsest first.
        for name, lateral, output in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs, strict=True
        ):
            if inner is not None:
                upsampled = F.interpolate(inner, scale_factor=2.0, mode="nearest")
            inner = lateral.run(below[name], relu=False, plus=upsampled)
            levels.insert(0, output(inner))
        if self.top_block is not None:
            source = self.top_block.in_feature
            named = dict(zip(self._out_features, levels, strict=False))
            levels.extend(self.top_block(below[source] if source in below else named[source]))
        return dict(zip(self._out_features, levels, strict=True))
