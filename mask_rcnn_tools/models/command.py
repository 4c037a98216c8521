"""Lists the models of detectron2's zoo that predict and fine-tuning can start from."""

from collections.abc import Sequence

from mask_rcnn_tools.arguments import Parser
from mask_rcnn_tools.models.zoo import MODELS, cached_file

PROGRAM = "mask-rcnn-plus models"

_EPILOG = f"""
examples:
  the list:
    {PROGRAM}
  draw COCO's 80 classes with one of them; the weights are downloaded once:
    {PROGRAM.split()[0]} predict --model mask_rcnn_R_101_FPN_3x photo.jpg
  fine-tune one on your own data: see configs/finetune

AP is that of COCO val2017, in percent, as detectron2 publishes it. Without a network, copy a file
from the cache of another machine to the same place.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command: returns 0."""
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--paths", action="store_true", help="show where the cache keeps each file")
    arguments = parser.parse_args(argv)
    width = max(map(len, MODELS))
    print(f"{'MODEL':{width}}  BOX AP  MASK AP  KEYPOINT AP    SIZE")
    for name, (box, mask, keypoints, megabytes) in MODELS.items():
        file = cached_file(name)
        print(
            f"{name:{width}}  {box:6.1f}  {mask or '-':>7}  {keypoints or '-':>11}  "
            f"{megabytes:3} MB  {'cached' if file.is_file() else ''}".rstrip()
        )
        if arguments.paths:
            print(f"  {file}")
    return 0
