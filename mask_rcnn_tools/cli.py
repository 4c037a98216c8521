"""The program ``mask-rcnn-plus``: finds the module of a command and runs it."""

import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version

from mask_rcnn_tools.arguments import run_command

PROGRAM = "mask-rcnn-plus"

# Command -> the module of mask_rcnn_tools that defines main(argv), and a description.
COMMANDS = {
    "predict": ("predict.command", "find and draw objects in images, folders and videos"),
    "report": ("report.command", "make an HTML page of an evaluation, or compare two"),
    "convert": ("convert.command", "convert labelme, VIA, VOC, YOLO or mask labels to COCO"),
    "check-data": ("check.command", "find errors in data sets, and repair their json"),
    "show-data": ("show_data.command", "draw training images as the model sees them, augmented"),
    "fit-anchors": ("fit_anchors.command", "find anchors that cover the boxes of a data set"),
    "lr-range": ("lr_range.command", "find a learning rate by training briefly while it rises"),
    "convert-torchvision": ("convert_torchvision", "convert torchvision's weights to detectron2's"),
    "doctor": ("doctor.command", "check the installation and the machine; for bug reports"),
}
# These modules import the plugin only after they have read the arguments, if at all.
LIGHT = {"predict", "show-data", "fit-anchors", "lr-range", "doctor"}
# Former commands, now scripts that run from a clone.
_MOVED = {"benchmark": "benchmarks.model", "ablate": "benchmarks.ablate"}


def _prepare_environment() -> None:
    """Sets what libraries read when they are imported."""
    # OpenMP threads that wait soon sleep, so that other processes can run.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # A container started with --user has no home folder, where libraries keep caches.
    if os.path.expanduser("~") in ("~", "/"):  # noqa: PTH111
        os.environ["HOME"] = f"{tempfile.gettempdir()}/mask_rcnn_plus_{os.getuid()}"
        os.environ.setdefault("USER", str(os.getuid()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the command and its arguments; by default those of the process.

    Returns:
        the exit code, see :func:`mask_rcnn_tools.arguments.run_command`.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # torch would abort
        print("error: the working directory was deleted: change to another", file=sys.stderr)
        return 2
    if name in COMMANDS:
        _prepare_environment()
        if name not in LIGHT:
            # Before anything else imports detectron2, because the plugin repairs it.
            importlib.import_module("mask_rcnn_plus")
        module = importlib.import_module(f"mask_rcnn_tools.{COMMANDS[name][0]}")
        return run_command(module.main, rest)
    if name == "--version":
        print(f"{PROGRAM} {version(PROGRAM)}")
        return 0
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if not name:
        print(_help(), file=sys.stderr)
        return 2
    print(f"error: {PROGRAM} has no command '{name}'; {_hint(name)}", file=sys.stderr)
    return 2


def _hint(name: str) -> str:
    if name in _MOVED:
        return f"in a clone, run `python -m {_MOVED[name]} --help`"
    close = get_close_matches(name, COMMANDS, n=1)
    return f"did you mean '{close[0]}'?" if close else f"see {PROGRAM} --help"


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""\
usage: {PROGRAM} COMMAND ...

Tools for Mask R-CNN with detectron2. To train and evaluate, use train_net.py.

commands:
{commands}

{PROGRAM} COMMAND --help shows the options of a command."""


if __name__ == "__main__":
    sys.exit(main())
