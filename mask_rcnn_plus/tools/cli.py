"""The command ``mask-rcnn-plus``: finds the tool that a command line names, and runs it."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version

from mask_rcnn_plus.errors import UserError, did_you_mean

PROGRAM = "mask-rcnn-plus"

# What is typed -> the module of mask_rcnn_plus.tools whose main(argv) runs it, and what it does.
# main(argv) returns the exit code, or raises UserError, of which this file makes one line.
COMMANDS = {
    "predict": ("predict", "find and draw the objects in images, folders, videos"),
    "report": ("report", "make a page of an evaluation's figures, errors and images, or of two"),
    "convert": ("convert", "make labels of labelme, VIA, VOC, YOLO, mask files a data set"),
    "check-data": ("check_data", "find what is wrong with data sets, and mend their json"),
    "show-data": ("show_data", "draw training images as the model gets them, augmented"),
    "fit-anchors": ("fit_anchors", "find anchors that cover the boxes of a data set"),
    "lr-range": ("lr_range", "find a learning rate: train a little while it rises"),
    "ablate": ("ablate", "train a folder of configs with several seeds, and compare them"),
    "benchmark model": ("benchmark_model", "time a whole model beside detectron2's, and compare"),
    "benchmark loading": ("benchmark_loading", "time the loading of training images"),
    "benchmark options": ("benchmark_options", "time training steps with one option each"),
    "benchmark roi-align": ("benchmark_roi", "time RoIAlign beside detectron2's and torchvision's"),
    "convert-torchvision": ("convert_torchvision", "make torchvision's weights detectron2's"),
    "doctor": ("doctor", "say what is here and whether it works; for bug reports"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a tool.

    Args:
        argv: the tool's name and its arguments; by default the process's own.

    Returns:
        the exit code: the tool's, 2 after one line on standard error about a mistake in the input,
        130 after Ctrl-C, 143 after SIGTERM, or 141 when what reads the output went away.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"{PROGRAM} {version(PROGRAM)}")
        return 0
    for name, (module, _) in COMMANDS.items():
        length = len(name.split())
        if words[:length] == name.split():
            return _run(module, words[length:])
    return _explain(words)


def _run(module: str, arguments: list[str]) -> int:
    # A tool may import much that another does not need.
    tool = importlib.import_module(f"mask_rcnn_plus.tools.{module}")
    if threading.current_thread() is threading.main_thread():
        # Unlike the default, this lets a tool end the processes that it has started.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = tool.main(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python writes out what is left as it ends, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _explain(words: list[str]) -> int:
    """Prints the help that was asked for, or what is wrong with a command that does not exist."""
    group: list[str] = []
    for word in words:
        if word not in _next_words(group):
            break
        group.append(word)
    rest = words[len(group) :]
    if not rest:
        print(_help(group), file=sys.stderr)
        return 2
    if rest[0] in ("-h", "--help"):
        print(_help(group))
        return 0
    program = " ".join([PROGRAM, *group])
    hint = did_you_mean(rest[0], _next_words(group)) or f"; see {program} --help"
    return _refuse(f"{program} has no command '{rest[0]}'{hint}")


def _next_words(group: list[str]) -> list[str]:
    """The words that continue the first words of a command."""
    names = [name.split() for name in COMMANDS]
    depth = len(group)
    return sorted({n[depth] for n in names if n[:depth] == group and len(n) > depth})


def _help(group: list[str]) -> str:
    program = " ".join([PROGRAM, *group])
    chosen = {n: text for n, (_, text) in COMMANDS.items() if n.split()[: len(group)] == group}
    names = {name: " ".join(name.split()[len(group) :]) for name in chosen}
    width = max(map(len, names.values()))
    lines = [f"  {names[name]:{width}}  {text}" for name, text in chosen.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            "Tools around Mask R-CNN for detectron2; train_net.py trains and evaluates.",
            "",
            "commands:",
            *lines,
            "",
            f"{program} COMMAND --help says what a command takes.",
        ]
    )


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
