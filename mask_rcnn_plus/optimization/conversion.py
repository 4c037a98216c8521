"""``optimize``: builds a model's fast copy for inference."""

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
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
from mask_rcnn_plus.modeling.pooler import FusedROIPooler, fused_pooler
from mask_rcnn_plus.optimization import layers, onednn
from mask_rcnn_plus.optimization.backbones import FusedBlock, FusedFPN, FusedStem, is_bare
from mask_rcnn_plus.optimization.heads import FloatKeypointHead, LeanMaskHead, PermutedBoxHead
from mask_rcnn_plus.optimization.model import OptimizationReport, OptimizedModel, as_optimized
from mask_rcnn_plus.optimization.proposals import FusedRPNHead, LeanRPN
from mask_rcnn_plus.optimization.wrappers import Compiled, GraphedBackbone

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def optimize(
    model: nn.Module, dtype: str = "fp32", *, compile: bool = False, cuda_graphs: bool = False
) -> nn.Module:
    """A copy of a detectron2 model that returns the same detections in less time.

    In the copy, norms with constant statistics are folded into convolutions, additions and ReLUs
    are fused with them (on CPUs), maps stay in channels_last from the image to the heads, all
    pyramid levels are pooled at once, boxes are decoded for the best anchors only, and masks are
    predicted for the predicted class only. A part that cannot be optimized in one of these ways
    runs as before, and ``optimization_report`` names it.

    The model stays unchanged and shares nothing with the copy, so later training does not change
    the copy. The copy is an instance of the model's class and can be used in its place
    (``DefaultPredictor.model``, ``inference_on_dataset``). It can be copied, pickled and moved. It
    is always in evaluation mode and refuses ``load_state_dict``. Images may have any size.

    Args:
        model: built by detectron2, with its weights loaded.
        dtype: of weights and maps: "fp32", the same results up to rounding; "bf16" or, on GPUs,
            "fp16". Boxes, the last layer of the box head and all scores stay fp32.
        compile: ``torch.compile`` the backbone and the RPN's head. The first images take a minute
            or two, and on CPUs it was not faster (docs/performance.md).
        cuda_graphs: on a GPU, replay the backbone as a CUDA graph where sizes repeat.

    Returns:
        the copy, with the attribute ``optimization_report``.

    Raises:
        UserError: an unknown dtype, a dtype that is slower on the device, or a model that is
            already optimized.
    """
    device = next((t.device for t in _tensors(model)), torch.device("cpu"))
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}")
    if isinstance(model, OptimizedModel):
        raise UserError("the model is already optimized; optimize the original model")
    if dtype == "fp16" and device.type == "cpu":
        raise UserError("dtype 'fp16' is slower than fp32 on CPUs; choose 'bf16'")
    torch_dtype = DTYPES[dtype]
    report = OptimizationReport(device=str(device), dtype=dtype)
    fused = device.type == "cpu" and onednn.is_usable(torch_dtype)
    if device.type == "cpu" and not fused:
        report.kept.append("ReLUs and additions: this torch lacks oneDNN's fused operators")
    if dtype == "bf16" and device.type == "cpu" and not _has_fast_bf16():
        report.kept.append("bf16: this CPU has no instructions for it, fp32 may be faster")
    with torch.no_grad():
        parts = _Replacements()
        _convert_layers(model, parts, torch_dtype, fused, report)
        _fuse_backbone(model, parts, report)
        _fuse_proposals(model, parts, report)
        _fuse_heads(model, parts, report)
        fast = parts.copy(model).eval()
        _keep_fp32(fast, torch_dtype, report)
    if fused and (bad := layers.disable_onednn_if_not_finite(fast)):
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        report.kept.append(
            f"ReLUs and additions: {bad[0]}{more} with NaN or infinite values, which oneDNN hides"
        )
    elif fused:
        report.done[0] += ", by oneDNN"
    _use_channels_last(fast, report)
    _report_unchanged(fast, report)
    if compile:
        _compile(fast, report)
    if cuda_graphs:
        _use_graphs(fast, device, report)
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    fast = as_optimized(fast, report, torch_dtype)
    report.weight_mib = sum(t.nbytes for t in _tensors(fast)) / 2**20
    logger.info("The model is %s", report)
    return fast


class _Replacements:
    """The modules that replace others in the copy of a model.

    ``copy.deepcopy`` finds them in its memo, so they replace the original wherever the model refers
    to it: under its name, and in the plain lists that detectron2's FPN and heads also keep.
    """

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}

    def copy(self, module: Any) -> Any:
        """A copy, with replacements for the modules in it; one object for each original."""
        return copy.deepcopy(module, self._memo)

    def replace(self, original: nn.Module, new: nn.Module) -> None:
        """Puts ``new``, with the hooks of ``original``, in its place in the copies."""
        for name in _HOOKS:
            getattr(new, name).update(self.copy(getattr(original, name)))
        self._memo[id(original)] = new


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _has_fast_bf16() -> bool:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_sve_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _convert_layers(
    model: nn.Module,
    parts: _Replacements,
    dtype: torch.dtype,
    fused: bool,
    report: OptimizationReport,
) -> None:
    # The small layers that predict scores and boxes stay fp32.
    exact = {
        layer
        for predictor in model.modules()
        if isinstance(predictor, FastRCNNOutputLayers)
        for layer in (predictor.cls_score, predictor.bbox_pred)
    }
    convolutions = norms = linear = 0
    for module in model.modules():
        if type(module) in (nn.Conv2d, Conv2d):
            norm, activation = getattr(module, "norm", None), getattr(module, "activation", None)
            after = {"norm": parts.copy(norm), "activation": parts.copy(activation)}
            new = layers.FusedConv2d(module, dtype=dtype, fused=fused, **after)
            convolutions, norms = convolutions + 1, norms + layers.is_foldable(norm)
        elif type(module) is nn.ConvTranspose2d:
            new = layers.CastConvTranspose2d(module, dtype=dtype, fused=fused)
            convolutions += 1
        elif type(module) is nn.Linear:
            kept = torch.float32 if module in exact else dtype
            new = layers.FusedLinear(module, dtype=kept, fused=fused, exact=kept != dtype)
            linear += 1
        else:
            continue
        parts.replace(module, new)
    report.done.append(
        f"{convolutions} convolutions ({norms} norms folded into them) and {linear} linear layers"
    )


def _fuse_backbone(model: nn.Module, parts: _Replacements, report: OptimizationReport) -> None:
    fused = unchanged = 0
    for stage in model.modules():
        for index, block in enumerate(stage if type(stage) is nn.Sequential else ()):
            if type(block) not in (BottleneckBlock, BasicBlock):
                continue
            if is_bare(*(converted := parts.copy(block)).children()):
                parts.replace(block, FusedBlock(converted, first=index == 0))
                fused += 1
            else:
                unchanged += 1
    if fused:
        report.done.append(f"{fused} residual blocks, additions and ReLUs fused")
    if unchanged:
        report.kept.append(f"{unchanged} residual blocks: their norms depend on the map")
    for stem in model.modules():
        if type(stem) is BasicStem and is_bare((converted := parts.copy(stem)).conv1):
            parts.replace(stem, FusedStem(converted))
    # This comes last, since an FPN contains the ResNet.
    for name, fpn in model.named_modules():
        if type(fpn) is FPN and FusedFPN.fits(converted := parts.copy(fpn)):
            parts.replace(fpn, FusedFPN(converted))
            report.done.append(f"{name}: additions fused")
        elif type(fpn) is FPN:
            report.kept.append(f"{name}: additions, because of its norms or its average")


def _fuse_proposals(model: nn.Module, parts: _Replacements, report: OptimizationReport) -> None:
    rpn = getattr(model, "proposal_generator", None)
    if rpn is None:
        return
    axis_aligned = getattr(getattr(rpn, "anchor_generator", None), "box_dim", 0) == 4
    head = getattr(rpn, "rpn_head", None)
    if type(head) is StandardRPNHead and axis_aligned:
        parts.replace(head, FusedRPNHead(parts.copy(head)))
        report.done.append("proposal_generator.rpn_head: predictions in one convolution")
    elif head is not None:
        report.kept.append(f"proposal_generator.rpn_head: unknown class {type(head).__name__}")
    if type(rpn) is RPN and axis_aligned:
        parts.replace(rpn, LeanRPN(parts.copy(rpn)))
        report.done.append("proposal_generator: boxes of the best anchors only")
    else:
        report.kept.append(f"proposal_generator: unknown class {type(rpn).__name__}")


def _fuse_heads(model: nn.Module, parts: _Replacements, report: OptimizationReport) -> None:
    roi_heads = getattr(model, "roi_heads", None)
    if roi_heads is None:
        return
    for name, pooler in roi_heads.named_children():
        if type(pooler) is not ROIPooler:
            continue
        new = fused_pooler(pooler, _pooler_type(pooler))
        if new is pooler:
            report.kept.append(f"roi_heads.{name}: rotated boxes")
        else:
            parts.replace(pooler, new)
            report.done.append(f"roi_heads.{name}: all levels in one call")
    box_pooler = parts.copy(getattr(roi_heads, "box_pooler", None))
    for name, head in roi_heads.named_modules(prefix="roi_heads"):
        if type(head) is FastRCNNConvFCHead and isinstance(box_pooler, FusedROIPooler):
            height, width = box_pooler.output_size
            parts.replace(head, PermutedBoxHead(parts.copy(head), cells=height * width))
            report.done.append(f"{name}: in channels_last order, ReLUs fused")
        elif type(head) is MaskRCNNConvUpsampleHead and LeanMaskHead.fits(parts.copy(head)):
            parts.replace(head, LeanMaskHead(parts.copy(head)))
            report.done.append(f"{name}: only the predicted class's mask")
        elif type(head) is KRCNNConvDeconvUpsampleHead:
            parts.replace(head, FloatKeypointHead(parts.copy(head)))
            report.done.append(f"{name}: ReLUs fused")
    replaced = (PermutedBoxHead, LeanMaskHead, FloatKeypointHead, nn.ModuleList)
    for name in ("box_head", "mask_head", "keypoint_head"):
        head = getattr(roi_heads, name, None)
        if isinstance(head, nn.Module) and not isinstance(parts.copy(head), replaced):
            report.kept.append(f"roi_heads.{name}: only the layers of {type(head).__name__}")


def _pooler_type(pooler: ROIPooler) -> str:
    level = pooler.level_poolers[0]
    kind = type(level).__name__
    if kind == "ROIAlign":
        return "ROIAlignV2" if level.aligned else "ROIAlign"
    return "ROIPool" if kind == "RoIPool" else "ROIAlignRotated"


def _keep_fp32(model: nn.Module, dtype: torch.dtype, report: OptimizationReport) -> None:
    """Keeps fp32 where other dtypes are unsupported.

    The NMS of detectors without RoIs needs scores and boxes in fp32, and not every device computes
    deformable convolutions in another dtype.
    """
    if dtype == torch.float32:
        return
    for name, module in model.named_modules():
        if isinstance(module, RetinaNetHead):  # or FCOS's head, a subclass
            for part in ("cls_score", "bbox_pred", "ctrness"):
                if isinstance(layer := getattr(module, part, None), nn.Module):
                    layer.register_forward_hook(_float_result)
            report.done.append(f"{name}: scores and boxes in fp32")
        elif isinstance(module, DeformConv | ModulatedDeformConv):
            module.register_forward_pre_hook(_float_inputs)


def _float_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def _float_result(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return result.float()


def _use_channels_last(model: nn.Module, report: OptimizationReport) -> None:
    if isinstance(getattr(model, "backbone", None), nn.Module):
        model.backbone.register_forward_pre_hook(_to_channels_last)
        report.done.append("maps in channels_last from the image to the heads")
    else:
        report.kept.append("layout of maps: the model has no backbone")


def _to_channels_last(backbone: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _report_unchanged(model: nn.Module, report: OptimizationReport) -> None:
    """Names layers with parameters or statistics that run as before, by type."""
    if not isinstance(model, GeneralizedRCNN):
        report.kept.append(f"the model: only the parts of {type(model).__name__}")
    backbone = getattr(model, "backbone", None)
    backbone = getattr(backbone, "bottom_up", backbone)
    if backbone is not None and not isinstance(backbone, ResNet):
        report.kept.append(f"backbone: only the layers of {type(backbone).__name__}")
    names_by_type: dict[str, list[str]] = defaultdict(list)
    # A box predictor's own tensors are only for its loss.
    known = (layers.InferenceLayer, FastRCNNOutputLayers)
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and name and not isinstance(module, known):
            names_by_type[type(module).__name__].append(name)
    for kind, names in names_by_type.items():
        if kind != "BufferList":  # the anchors
            report.kept.append(f"{len(names)} {kind} (as {names[0]})")


def _compile(model: nn.Module, report: OptimizationReport) -> None:
    modules = dict(model.named_modules())
    for name in ("backbone", "proposal_generator.rpn_head"):
        if name in modules:
            model.set_submodule(name, Compiled(modules[name], name=name, report=report))
            report.done.append(f"{name}: torch.compile")


def _use_graphs(model: nn.Module, device: torch.device, report: OptimizationReport) -> None:
    if device.type != "cuda":
        report.kept.append(f"CUDA graphs: the model is on {device}")
    elif isinstance(getattr(model, "backbone", None), nn.Module):
        model.backbone = GraphedBackbone(model.backbone)
        report.done.append("backbone: a CUDA graph where sizes repeat (no GPU has run this yet)")
