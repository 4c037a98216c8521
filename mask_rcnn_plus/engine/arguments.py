"""The arguments of train_net.py. Imports only the standard library, see train_net.py."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

TRUST_FLAG = "--trust-checkpoint"

_NO_CONFIG = "no config file: give one with --config-file configs/quickstart.yaml"

_EXAMPLES = """
Examples:
  a first run, without data or a GPU:
    train_net.py --config-file configs/quickstart.yaml
  your own data (see datasets/README.md):
    train_net.py --config-file configs/small_data.yaml \\
        DATASETS.TRAIN "('mine_train',)" DATASETS.TEST "('mine_val',)"
  evaluate a checkpoint:
    train_net.py --config-file output/small_data/config.yaml --eval-only \\
        MODEL.WEIGHTS output/small_data/model_final.pth
  several GPUs, or several CPU processes:
    train_net.py --num-gpus 4 --config-file ...
    torchrun --nproc-per-node 2 train_net.py --config-file ...
  continue an interrupted run:
    train_net.py --resume --config-file ...

Exit codes:
    0  done
    2  an invalid argument, config, data set or checkpoint
    3  training diverged; OUTPUT_DIR/divergence.pt has the batch
    4  a checkpoint could not be written; the last one is intact
    5  a worker of the data loader died or hangs; the run is saved. Or
       another process of the run died; the last checkpoint is intact
  130  SIGINT (Ctrl-C), 143  SIGTERM, 129  SIGHUP (a closed terminal): the run
       is saved after the current step; a second signal ends it at once
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Every process of torchrun parses: print one line per machine, without argparse's usage.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            see = " See" if message.endswith("?") else "; see"
            # A file name may contain line breaks and control characters.
            line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
            try:
                print(f"error: {line}{see} {train_command()} --help", file=sys.stderr, flush=True)
            except OSError:  # nobody reads it; Python would write it once more when it exits
                sys.stderr = None
        sys.exit(2)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of detectron2's train_net.py, and ``--trust-checkpoint``.

    Raises:
        SystemExit: after ``--help``, or with code 2 after one line about a mistake.
    """
    parser = _Parser(
        description="Trains a model, or evaluates it with --eval-only.",
        epilog=_EXAMPLES.replace("    train_net.py", f"    {train_command()}"),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", type=_file, metavar="YAML", help="config to read (required)")
    add("--resume", action="store_true", help="continue from the last checkpoint of OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate, do not train")
    # Not a config key: an untrusted config must not decide which files the user trusts.
    add(
        TRUST_FLAG,
        action="store_true",
        help="read the file of MODEL.WEIGHTS as a full pickle, which may run any code",
    )
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs per machine (default: 1)")
    add("--num-machines", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--machine-rank", type=int, default=0, metavar="I", help="this machine, from 0")
    # As in detectron2, all runs of a user have the same port: if an earlier run left processes
    # behind, the port is in use, and the new run reports it.
    port = 2**15 + 2**14 + (os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    add(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        metavar="URL",
        help="address where the processes of several GPUs or machines connect",
    )
    text = "config keys and values, after all options"
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=text)
    arguments = parser.parse_args(argv)
    if arguments.config_file is None:  # argparse would report it before a wrong option
        parser.error(_NO_CONFIG)
    for key in arguments.opts[0::2]:
        if key.startswith("-"):
            parser.error(f"option '{key}' follows a config key: put options first")
    if len(arguments.opts) % 2:
        parser.error(f"config key '{arguments.opts[-1]}' has no value")
    if arguments.num_gpus < 1 or arguments.num_machines < 1:
        parser.error("--num-gpus and --num-machines must be 1 or more (1 on a CPU)")
    return arguments


def by_uv() -> bool:
    """Whether this process was started by ``uv run``."""
    return "UV_RUN_RECURSION_DEPTH" in os.environ


def train_command() -> str:
    """How the user starts train_net.py: the first words of a command to paste."""
    if by_uv():
        return "uv run train_net.py"
    # The Python that runs now, because another one may not have the packages.
    name = Path(sys.executable).name
    found = shutil.which(name) == sys.executable
    return f"{name if found else shlex.quote(sys.executable)} train_net.py"


def _file(text: str) -> str:
    """Argument ``type``: the path of a file that exists."""
    if not text:
        raise argparse.ArgumentTypeError(_NO_CONFIG)
    path = Path(text)
    try:
        if path.is_file():
            return text
        siblings = [sibling.name for sibling in path.parent.glob("*.yaml")]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot open '{text}': {why}") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder: name a .yaml file in it")
    close = get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean '{path.with_name(close[0])}'?" if close else ""
    raise argparse.ArgumentTypeError(f"file '{text}' does not exist{hint}")
