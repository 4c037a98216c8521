"""The command ``mask-rcnn-plus``: finds the module of the command that was typed, and runs it."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version

from mask_rcnn_tools.arguments import run_command

PROGRAM = "mask-rcnn-plus"

# Command -> the module of mask_rcnn_tools that has its main(argv), and what it does.
COMMANDS = {
    "predict": ("predict.command", "find and draw objects in images, folders and videos"),
    "report": ("report.command", "make an HTML page of an evaluation, or compare two"),
    "convert": ("convert.command", "convert labelme, VIA, VOC, YOLO or mask labels to COCO"),
    "check-data": ("check.command", "find errors in data sets, and repair their json"),
    "show-data": ("show_data", "draw training images as the model sees them, augmented"),
    "fit-anchors": ("fit_anchors", "find anchors that cover the boxes of a data set"),
    "lr-range": ("lr_range", "find a learning rate by training briefly while it rises"),
    "convert-torchvision": ("convert_torchvision", "convert torchvision's weights to detectron2's"),
    "doctor": ("doctor.command", "check the installation and the machine; for bug reports"),
}
# Once commands, now scripts of a clone.
_MOVED = {"benchmark": "benchmarks.model", "ablate": "benchmarks.ablate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the command and its arguments; by default the process's own.

    Returns:
        the exit code, see :func:`mask_rcnn_tools.arguments.run_command`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        # Imported only now: a command may need much that another does not. The plugin comes first,
        # since it repairs detectron2; the doctor examines both in processes of its own.
        if words[0] != "doctor":
            importlib.import_module("mask_rcnn_plus")
        module = importlib.import_module(f"mask_rcnn_tools.{COMMANDS[words[0]][0]}")
        return run_command(module.main, words[1:])
    if words[:1] == ["--version"]:
        print(f"{PROGRAM} {version(PROGRAM)}")
        return 0
    if words[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    if not words:
        print(_help(), file=sys.stderr)
        return 2
    print(f"error: {PROGRAM} has no command '{words[0]}'; {_hint(words[0])}", file=sys.stderr)
    return 2


def _hint(word: str) -> str:
    if word in _MOVED:
        return f"in a clone, run `python -m {_MOVED[word]} --help`"
    close = get_close_matches(word, COMMANDS, n=1)
    return f"did you mean '{close[0]}'?" if close else f"see {PROGRAM} --help"


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""\
usage: {PROGRAM} COMMAND ...

Tools around Mask R-CNN for detectron2; train_net.py trains and evaluates.

commands:
{commands}

{PROGRAM} COMMAND --help shows the options of a command."""


if __name__ == "__main__":
    sys.exit(main())
