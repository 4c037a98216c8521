"""Writes the config of a checkpoint for programs that use detectron2 without mask_rcnn_plus."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mask_rcnn_tools.arguments import Parser, existing_file, weights
from mask_rcnn_tools.files import complete_file, require_new, writing

PROGRAM = "mask-rcnn-plus stock-config"

_EPILOG = f"""
example:
  {PROGRAM} --weights output/balloons/model_final.pth --output balloons_detectron2.yaml

The file has detectron2's keys and ROI heads only, so `cfg.merge_from_file` of any program accepts
it, and the detections are the same. Each run writes one to OUTPUT_DIR/config_detectron2.yaml.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command: returns 0."""
    arguments = _parse(argv)
    require_new(arguments.output, overwrite=arguments.overwrite)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_plus.config.stock import write_stock_config
    from mask_rcnn_plus.device import resolve_device
    from mask_rcnn_plus.prediction.building import read_config, resolve_classes

    trusted = arguments.trust_checkpoint
    cfg = read_config(arguments.weights, arguments.config_file, trusted=trusted)
    cfg, _ = resolve_classes(cfg, trusted=trusted)
    cfg.defrost()
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    if Path(arguments.weights).is_file():
        cfg.MODEL.WEIGHTS = str(Path(arguments.weights).absolute())
    with writing(arguments.output), complete_file(arguments.output) as part:
        write_stock_config(cfg, part)
    print(f"written: {arguments.output}", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--weights", type=weights, required=True, metavar="FILE", help="checkpoint, or its URL"
    )
    parser.add_argument(
        "--config-file",
        type=existing_file,
        metavar="YAML",
        help="config, if FILE does not contain one",
    )
    parser.add_output("YAML", "file to write")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="read FILE as a full pickle, which may run any code",
    )
    return parser.parse_args(argv)
