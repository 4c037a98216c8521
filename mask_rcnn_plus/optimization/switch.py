"""``optimize``: a model's fast copy for inference."""

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from torch import Tensor, nn

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.modeling.pooler import FusedROIPooler
from mask_rcnn_plus.modeling.roi_heads import fused_pooler
from mask_rcnn_plus.optimization import backbones, heads, layers, onednn, proposals
from mask_rcnn_plus.optimization.compiling import Compiled
from mask_rcnn_plus.optimization.graphs import GraphedBackbone
from mask_rcnn_plus.optimization.model import (
    OptimizedModel,
    optimized_class,
)
from mask_rcnn_plus.optimization.precision import keep_single
from mask_rcnn_plus.optimization.report import OptimizationReport

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIB = 2**20


def optimize(
    model: nn.Module, dtype: str = "fp32", *, compile: bool = False, cuda_graphs: bool = False
) -> nn.Module:
    """A copy of a detectron2 model that gives the same detections in less time.

    Norms with constant statistics are folded into convolutions, additions and ReLUs computed with
    them (on CPUs), maps kept in channels_last from the image to the heads, all pyramid levels
    pooled at once, boxes decoded for the best anchors alone, masks predicted for the predicted
    class alone. What of that does not apply to a part of the model leaves the part as it is, and
    ``optimization_report`` names it.

    The model itself is left as it is, and shares nothing with the copy: later training does not
    change the copy. The copy is of the model's class, goes where that goes (``DefaultPredictor``'s
    ``model``, ``inference_on_dataset``), can be copied, pickled and moved, is always in evaluation
    mode, and takes no ``load_state_dict``. Images may have any size.

    Args:
        model: built by detectron2, with its weights loaded.
        dtype: of weights and maps: "fp32", the same results up to rounding; "bf16" or, on GPUs,
            "fp16". Boxes, the last layer of the box head and all scores stay fp32.
        compile: ``torch.compile`` the backbone and the RPN's head; the first images take a minute
            or two, and on CPUs it has not paid (README, "Performance").
        cuda_graphs: on a GPU, replay the backbone as a CUDA graph where sizes repeat.

    Returns:
        the copy, with the attribute ``optimization_report``.

    Raises:
        UserError: an unknown dtype, one that the device is slower with, or a model that is an
            optimised one already.
    """
    device = next((t.device for t in _tensors(model)), torch.device("cpu"))
    _check(model, dtype, device)
    model, kind = copy.deepcopy(model).eval(), DTYPES[dtype]
    report = OptimizationReport(device=str(device), dtype=dtype)
    fused = device.type == "cpu" and onednn.is_usable(kind)
    if device.type == "cpu" and not fused:
        report.kept.append("ReLUs and additions: this torch has no oneDNN that computes them")
    if dtype == "bf16" and device.type == "cpu" and not _has_fast_bf16():
        report.kept.append("bf16: this CPU has no instructions for it, fp32 may be faster")
    with torch.no_grad():
        _convert_layers(model, kind, fused, report)
        _fuse_backbone(model, report)
        _fuse_proposals(model, report)
        _fuse_heads(model, report)
        keep_single(model, kind, report)
    if fused and (bad := layers.leave_out_onednn_if_not_finite(model)):
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        report.kept.append(
            f"ReLUs and additions: {bad[0]}{more} with NaN or infinite values, which oneDNN hides"
        )
    elif fused:
        report.done[0] += ", by oneDNN"
    _use_layout(model, kind, report)
    _name_what_is_left(model, report)
    if compile:
        _compile(model, report)
    if cuda_graphs:
        _use_graphs(model, device, report)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.__class__ = optimized_class(type(model))
    model.optimization_report, model.optimization_dtype = report, kind
    report.weight_mib = sum(t.nbytes for t in _tensors(model)) / _MIB
    logger.info("The model is %s", report)
    return model


def _check(model: nn.Module, dtype: str, device: torch.device) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}': it must be {', '.join(DTYPES)}")
    if isinstance(model, OptimizedModel):
        raise UserError("the model is optimised already: optimise the one that it was made of")
    if dtype == "fp16" and device.type == "cpu":
        raise UserError("dtype is 'fp16', which CPUs compute slower than fp32: take 'bf16'")


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _has_fast_bf16() -> bool:
    cpu = torch.cpu
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_sve_supported")
    return any(getattr(cpu, name, bool)() for name in names)


def _convert_layers(
    model: nn.Module, dtype: torch.dtype, fused: bool, report: OptimizationReport
) -> None:
    # What gives scores and boxes keeps its precision; it is small.
    exact = {
        layer
        for predictor in model.modules()
        if isinstance(predictor, FastRCNNOutputLayers)
        for layer in (predictor.cls_score, predictor.bbox_pred)
    }
    counts: dict[str, int] = defaultdict(int)
    for module in list(model.modules()):
        if type(module) in (nn.Conv2d, Conv2d):
            counts["norms"] += layers.is_foldable(getattr(module, "norm", None))
            layers.convert_convolution(module, dtype, fused)
            counts["convolutions"] += 1
        elif type(module) is nn.ConvTranspose2d:
            layers.convert(module, layers.CastConvTranspose2d, dtype, fused)
            counts["convolutions"] += 1
        elif type(module) is nn.Linear:
            own = torch.float32 if module in exact else dtype
            layers.convert(module, layers.FusedLinear, own, fused)
            module.exact = own != dtype
            counts["linear layers"] += 1
    report.done.append(
        f"{counts['convolutions']} convolutions (with {counts['norms']} norms folded into them) "
        f"and {counts['linear layers']} linear layers"
    )


def _fuse_backbone(model: nn.Module, report: OptimizationReport) -> None:
    fused = left = 0
    for stage in model.modules():
        for index, block in enumerate(stage if type(stage) is nn.Sequential else ()):
            if type(block) in (BottleneckBlock, BasicBlock):
                done = backbones.fuse_block(block, first=index == 0)
                fused, left = fused + done, left + (not done)
    if fused:
        report.done.append(f"{fused} residual blocks, additions and ReLUs fused")
    if left:
        report.kept.append(f"{left} residual blocks: their norms depend on the map")
    for name, module in model.named_modules():
        if type(module) is BasicStem and backbones.is_bare(module.conv1):
            module.__class__ = backbones.FusedStem
        elif type(module) is FPN:
            if backbones.fuse_fpn(module):
                report.done.append(f"{name}: additions fused")
            else:
                report.kept.append(f"{name}: additions, for its norms or its average")


def _fuse_proposals(model: nn.Module, report: OptimizationReport) -> None:
    rpn = getattr(model, "proposal_generator", None)
    if rpn is None:
        return
    four = getattr(getattr(rpn, "anchor_generator", None), "box_dim", 0) == 4
    head = getattr(rpn, "rpn_head", None)
    if type(head) is StandardRPNHead and four:
        proposals.fuse_rpn_head(head)
        report.done.append("proposal_generator.rpn_head: predictions in one convolution")
    elif head is not None:
        report.kept.append(f"proposal_generator.rpn_head: a {type(head).__name__} is unknown")
    if type(rpn) is RPN and four:
        rpn.__class__ = proposals.LeanRPN
        report.done.append("proposal_generator: boxes of the best anchors alone")
    else:
        report.kept.append(f"proposal_generator: a {type(rpn).__name__} is unknown")


def _fuse_heads(model: nn.Module, report: OptimizationReport) -> None:
    roi_heads = getattr(model, "roi_heads", None)
    if roi_heads is None:
        return
    for name, pooler in list(roi_heads.named_children()):
        if type(pooler) is ROIPooler:
            swapped = fused_pooler(pooler, _pooler_type(pooler))
            setattr(roi_heads, name, swapped)
            if swapped is pooler:
                report.kept.append(f"roi_heads.{name}: of rotated boxes")
            else:
                report.done.append(f"roi_heads.{name}: all levels in one call")
    pooler = getattr(roi_heads, "box_pooler", None)
    for name, head in roi_heads.named_modules(prefix="roi_heads"):
        if type(head) is FastRCNNConvFCHead and isinstance(pooler, FusedROIPooler):
            heads.permute_box_head(head, pooler.output_size[0] * pooler.output_size[1])
            report.done.append(f"{name}: laid out for channels_last, ReLUs fused")
        elif type(head) is MaskRCNNConvUpsampleHead and _is_lean(head):
            heads.slim_mask_head(head)
            report.done.append(f"{name}: the predicted class's mask alone")
        elif type(head) is KRCNNConvDeconvUpsampleHead:
            heads.fuse_keypoint_head(head)
            report.done.append(f"{name}: ReLUs fused")
    known = (heads.PermutedBoxHead, heads.LeanMaskHead, heads.FloatKeypointHead, nn.ModuleList)
    for name in ("box_head", "mask_head", "keypoint_head"):
        head = getattr(roi_heads, name, None)
        if isinstance(head, nn.Module) and not isinstance(head, known):
            report.kept.append(
                f"roi_heads.{name}: of a {type(head).__name__} each layer alone is optimised"
            )


def _is_lean(head: nn.Module) -> bool:
    simple = type(head.deconv_relu) is nn.ReLU and getattr(head.predictor, "norm", None) is None
    if simple:
        # Part of the deconvolution from now on.
        head.deconv_relu = nn.Identity()
    return simple


def _pooler_type(pooler: ROIPooler) -> str:
    level = pooler.level_poolers[0]
    kind = type(level).__name__
    if kind == "ROIAlign":
        return "ROIAlignV2" if level.aligned else "ROIAlign"
    return "ROIPool" if kind == "RoIPool" else "ROIAlignRotated"


def _use_layout(model: nn.Module, dtype: torch.dtype, report: OptimizationReport) -> None:
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        report.kept.append("layout of maps: there is no backbone")
        return
    model.backbone.register_forward_pre_hook(_to_channels_last)
    report.done.append("maps in channels_last from the image to the heads")


def _to_channels_last(backbone: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _compile(model: nn.Module, report: OptimizationReport) -> None:
    for owner, part in (
        (model, "backbone"),
        (getattr(model, "proposal_generator", None), "rpn_head"),
    ):
        module = getattr(owner, part, None)
        if isinstance(module, nn.Module):
            name = part if owner is model else f"proposal_generator.{part}"
            setattr(owner, part, Compiled(module, name, report))
            report.done.append(f"{name}: torch.compile")


def _use_graphs(model: nn.Module, device: torch.device, report: OptimizationReport) -> None:
    if device.type != "cuda":
        report.kept.append(f"CUDA graphs: the model is on {device}")
    elif isinstance(getattr(model, "backbone", None), nn.Module):
        model.backbone = GraphedBackbone(model.backbone, report)
        report.done.append("backbone: a CUDA graph where sizes repeat (no GPU has run this yet)")


def _name_what_is_left(model: nn.Module, report: OptimizationReport) -> None:
    """Layers with parameters or statistics that run as they did, by type."""
    if not isinstance(model, GeneralizedRCNN):
        report.kept.append(f"the model: of a {type(model).__name__} what it is made of alone")
    bottom_up = getattr(getattr(model, "backbone", None), "bottom_up", None)
    backbone = bottom_up if isinstance(bottom_up, nn.Module) else getattr(model, "backbone", None)
    if backbone is not None and not isinstance(backbone, ResNet):
        report.kept.append(
            f"backbone: of a {type(backbone).__name__} each layer alone is optimised"
        )
    left: dict[str, list[str]] = defaultdict(list)
    # What a box predictor holds itself is for its loss.
    known = (layers.InferenceLayer, FastRCNNOutputLayers)
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and name and not isinstance(module, known):
            left[type(module).__name__].append(name)
    for kind, names in left.items():
        if kind != "BufferList":  # of anchors
            report.kept.append(f"{len(names)} {kind} (as {names[0]})")
