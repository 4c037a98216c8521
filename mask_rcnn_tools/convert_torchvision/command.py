"""Converts torchvision's weights of maskrcnn_ or fasterrcnn_resnet50_fpn to detectron2."""

import argparse
from collections.abc import Sequence

from mask_rcnn_tools.arguments import Parser, any_path, weights
from mask_rcnn_tools.files import require_new
from mask_rcnn_tools.terminal import quote

PROGRAM = "mask-rcnn-plus convert-torchvision"
CONFIG = "configs/torchvision_R_50_FPN.yaml"

_EPILOG = f"""\
example:
  {PROGRAM} maskrcnn_resnet50_fpn_coco.pth output/torchvision.pth --coco

The command changes:
  - the names of the parameters
  - the order of the input channels, from RGB to BGR
  - the position of the background class: first in torchvision, last in detectron2's class scores;
    it has no boxes and masks in detectron2
  - the weights of batch norm, for detectron2's epsilon
{CONFIG} contains the settings that the weights need: the mean and
standard deviation of pixels, RoIAlign with aligned=False and 2 x 2 samples, and strides in the
3 x 3 convolutions.

These differences remain: torchvision rounds the corners of its anchors to whole pixels, drops boxes
narrower than 0.01 pixels, and interpolates differently when it resizes images and pastes masks.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    arguments = _parse(argv)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_plus.engine import saving
    from mask_rcnn_plus.errors import UserError, reason
    from mask_rcnn_tools.convert_torchvision.conversion import convert, read_state

    state = convert(
        read_state(arguments.input), coco=arguments.coco, batch_norm_eps=arguments.batch_norm_eps
    )
    try:
        saving.save({"model": state, "__author__": "torchvision"}, arguments.output)
    except saving.SaveError as error:
        cause = reason(error.__cause__ or error)
        raise UserError(f"cannot write {arguments.output}: {cause}") from error
    classes = len(state["roi_heads.box_predictor.cls_score.bias"]) - 1
    masks = any(name.startswith("roi_heads.mask_head.") for name in state)
    print(f"written: {arguments.output}; use it with")
    print(
        f"  --config-file {CONFIG} MODEL.WEIGHTS {quote(str(arguments.output))} "
        f"MODEL.ROI_HEADS.NUM_CLASSES {classes}" + ("" if masks else " MODEL.MASK_ON False")
    )
    if classes == 90:
        print("The classes are COCO's ids 1 to 90; --coco keeps the 80 that COCO uses.")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("input", type=weights, metavar="IN.pth", help="state dict of torchvision")
    parser.add_argument("output", type=any_path, metavar="OUT.pth", help="checkpoint to write")
    parser.add_argument(
        "--coco", action="store_true", help="keep only the 80 of 90 classes that COCO uses"
    )
    parser.add_argument(
        "--batch-norm-eps",
        type=float,
        choices=(0.0, 1e-5),
        default=0.0,
        help="epsilon of the batch norm: 0 (default) for torchvision's COCO weights and models "
        "trained from them, else 1e-5",
    )
    parser.add_overwrite()
    arguments = parser.parse_args(argv)
    require_new(arguments.output, overwrite=arguments.overwrite, option="OUT.pth")
    return arguments
