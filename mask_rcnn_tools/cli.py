"""The program ``mask-rcnn-plus``: finds the module of a command and runs it."""

import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version

from mask_rcnn_tools.arguments import UsageError, run_command
from mask_rcnn_tools.terminal import PROGRAM, shell_command

# Command -> its folder in mask_rcnn_tools, whose command.py defines main(argv), and a description.
COMMANDS = {
    "predict": ("predict", "find and draw objects in images, folders and videos"),
    "models": ("models", "list the pretrained models that predict and train can start from"),
    "report": ("report", "make an HTML page of an evaluation, or compare two"),
    "convert": ("convert", "convert labels of Roboflow, CVAT, labelme, YOLO, ... to a data set"),
    "check-data": ("check", "find errors in data sets, and repair their json"),
    "show-data": ("show_data", "draw training images as the model sees them, augmented"),
    "fit-anchors": ("fit_anchors", "find anchors that cover the boxes of a data set"),
    "lr-range": ("lr_range", "find a learning rate by training briefly while it rises"),
    "convert-torchvision": ("convert_torchvision", "convert torchvision's weights to detectron2's"),
    "stock-config": ("stock_config", "write a checkpoint's config for plain detectron2"),
    "doctor": ("doctor", "check the installation and the machine; for bug reports"),
}
_TRAIN = ("train_net.py", "--config-file", "YAML")
_EVALUATE = (*_TRAIN, "--eval-only", "MODEL.WEIGHTS", "FILE")
_PREDICT = (PROGRAM, "predict", "--weights", "FILE", "INPUT")
# What people type -> the command line that does it. The benchmarks run from a clone.
_ELSEWHERE = {
    **dict.fromkeys(("train", "fit"), _TRAIN),
    **dict.fromkeys(("val", "eval", "evaluate", "test"), _EVALUATE),
    **dict.fromkeys(("detect", "inference", "segment"), _PREDICT),
    "benchmark": ("-m", "benchmarks.model", "--help"),
    "ablate": ("-m", "benchmarks.ablate", "--help"),
}
_NO_EXPORT = (
    "models run in Python, with mask_rcnn_plus.BatchPredictor (docs/predict.md); to trace one, use "
    "detectron2.export.TracingAdapter"
)


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
    if name in COMMANDS:
        _prepare_environment()
        module = importlib.import_module(f"mask_rcnn_tools.{COMMANDS[name][0]}.command")
        return run_command(module.main, rest)
    return run_command(_without_command, [name])


def _without_command(argv: Sequence[str]) -> int:
    (name,) = argv
    if name == "--version":
        print(f"{PROGRAM} {version(PROGRAM)}")
    elif name in ("-h", "--help"):
        print(_help())
    elif name:
        raise UsageError(f"{PROGRAM} has no command '{name}'; {_hint(name)}")
    else:
        print(_help(), file=sys.stderr)
        return 2
    return 0


def _hint(name: str) -> str:
    if name == "export":
        return _NO_EXPORT
    if name in _ELSEWHERE:
        return f"use: {shell_command(*_ELSEWHERE[name])}"
    close = get_close_matches(name, COMMANDS, n=1)
    return f"did you mean '{close[0]}'?" if close else f"see {shell_command(PROGRAM)} --help"


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    start = shell_command(PROGRAM)
    return f"""\
usage: {start} COMMAND ...

Tools for Mask R-CNN with detectron2. To train and evaluate, use {shell_command("train_net.py")}.

commands:
{commands}

{start} COMMAND --help shows the options of a command."""


if __name__ == "__main__":
    sys.exit(main())
