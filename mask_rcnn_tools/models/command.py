"""Lists the models of detectron2's zoo that predict and train here."""

from collections.abc import Sequence

from mask_rcnn_tools.arguments import Parser
from mask_rcnn_tools.models.zoo import DEFAULT, PUBLISHED, cached_file, checkpoints

PROGRAM = "mask-rcnn-plus models"

_EPILOG = f"""
examples:
  {PROGRAM}
  mask-rcnn-plus predict --model keypoint_rcnn_R_50_FPN_3x photo.jpg
  mask-rcnn-plus predict photo.jpg        (uses {DEFAULT})

AP is what detectron2 published for COCO val2017. MB are of the file, if it is cached, else 4 bytes
per parameter. Weights are downloaded when they are first used, into $FVCORE_CACHE (default:
~/.torch/iopath_cache). To fine-tune one, see configs/finetune.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command: returns 0."""
    Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG).parse_args(argv)
    zoo = checkpoints()
    print(f"{'model':32}  box AP  mask AP  keypoint AP   MB  cached")
    for name, (*metrics, megabytes) in PUBLISHED.items():
        box, mask, keypoint = (f"{ap:.1f}" if ap else "" for ap in metrics)
        cached = cached_file(zoo[name])
        if is_cached := cached.is_file():
            megabytes = round(cached.stat().st_size / 1e6)
        print(
            f"{name.rpartition('/')[2]:32}  {box:>6}  {mask:>7}  {keypoint:>11}  {megabytes:>3}"
            f"{'  yes' * is_cached}"
        )
    return 0
