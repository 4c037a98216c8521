"""The command train_net.py."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.engine import lock, saving
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.checks import DataCheck
from mask_rcnn_plus.engine.console import in_one_line, lasting_output
from mask_rcnn_plus.engine.launch import LostProcessError, launch, lost_process
from mask_rcnn_plus.engine.setup import setup
from mask_rcnn_plus.engine.stops import Interrupt
from mask_rcnn_plus.engine.trainer import Trainer
from mask_rcnn_plus.engine.weights import TRUST_FLAG
from mask_rcnn_plus.errors import UserError, reason

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
    5  a worker of the data loader died or hangs; the run is saved.
       Or another process of the run died; the last checkpoint is intact
  130  SIGINT (Ctrl-C), 143  SIGTERM, 129  SIGHUP (a closed terminal): the run
       is saved after the current step; a second signal ends it at once
"""

# In place of detectron2's texts, which also promise LazyConfig.
_HELP = {
    "opts": "config keys and values, after all options: KEY VALUE ...",
    "resume": "continue from the last checkpoint of OUTPUT_DIR",
}


@lasting_output()
def main(argv: Sequence[str] | None = None, *, check_data: DataCheck | None = None) -> int:
    """Trains, or evaluates with ``--eval-only``.

    Args:
        argv: command-line arguments; by default those of the process.
        check_data: checks the data sets as DATA_CHECK configures. Each process of the run calls
            it, so it must be a module-level function.

    Returns:
        the exit code, as listed in ``--help``; an error is one line on standard error.
    """
    parser = default_argument_parser(epilog=_EXAMPLES)
    # Not a config key: an untrusted config must not decide which files the user trusts.
    parser.add_argument(
        TRUST_FLAG,
        action="store_true",
        help="read the file of MODEL.WEIGHTS as a full pickle, which may run any code",
    )
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
    parser.error = _refuse_arguments  # type: ignore[method-assign]  (argparse prints its usage too)
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        launch(partial(_run, check_data=check_data), args, resolve_device(cfg.MODEL.DEVICE))
    except UserError as error:
        # Every process of torchrun reaches this line: print one line per machine.
        return _report(error, show=os.environ.get("LOCAL_RANK", "0") == "0")
    except Interrupt as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _refuse_arguments(message: str) -> NoReturn:
    print(f"error: {message}; see train_net.py --help", file=sys.stderr)
    sys.exit(2)


@lasting_output()
def _run(args: argparse.Namespace, *, check_data: DataCheck | None = None) -> None:
    """Runs in each process; prints a UserError in one line and raises an Interrupt instead."""
    # detectron2's gather of Python objects causes it in each process.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    _allow_open_files()
    running = False
    try:
        cfg = setup(args, check_data=check_data)
        run = _prepare_evaluation(cfg, args) if args.eval_only else _prepare_training(cfg, args)
        running = True
        run()
    except Exception as error:
        if (known := _as_user_error(error)) is None:
            raise
        # Before the run, all processes raise the same UserError: one line per machine. In it, only
        # this process raises it, for example for one of its images.
        show = running or known is not error or comm.get_local_rank() == 0
        raise Interrupt(_report(known, show=show)) from error
    finally:
        lock.release()


def _allow_open_files() -> None:
    """Raises the limit of open files, since loader workers pass each tensor as one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # missing on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _as_user_error(error: Exception) -> UserError | None:
    """The error in one line, if it is the user's or the machine's; None for a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in saving.NO_WRITING:
        return saving.SaveError(f"cannot write '{error.filename or 'a file'}': {reason(error)}")
    if lost_process(error):
        return LostProcessError(
            "another process of the run has ended; its own message says why; --resume continues "
            "from the last checkpoint"
        )
    return None


def _prepare_training(cfg: CfgNode, args: argparse.Namespace) -> Callable[[], None]:
    with in_one_line("the config cannot be built"):
        trainer = Trainer(cfg)
    trainer.checkpointer.trusted = _trusted(cfg, args)
    with in_one_line("the checkpoint cannot be used"):
        trainer.resume_or_load(resume=args.resume)

    def train() -> None:
        trainer.train()
        if comm.is_main_process():
            _print_next_steps(cfg)

    return train


def _prepare_evaluation(cfg: CfgNode, args: argparse.Namespace) -> Callable[[], None]:
    with in_one_line("the config cannot be built"):
        model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, strict=True)
    checkpointer.trusted = _trusted(cfg, args)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)

    def evaluate() -> None:
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
            _print_previews(cfg)

    return evaluate


def _trusted(cfg: CfgNode, args: argparse.Namespace) -> str:
    # detectron2's own parser, which a caller may use, does not have the option.
    return cfg.MODEL.WEIGHTS if getattr(args, "trust_checkpoint", False) else ""


def _print_next_steps(cfg: CfgNode) -> None:
    output = Path(cfg.OUTPUT_DIR)
    root = os.environ.get("DETECTRON2_DATASETS")
    environment = f"DETECTRON2_DATASETS={root} " if root else ""
    print(
        "\nNext:\n"
        f"  curves:           uv run tensorboard --logdir {output}\n"
        f"  evaluate again:   {environment}uv run train_net.py --config-file "
        f"{output / 'config.yaml'} --eval-only MODEL.WEIGHTS {output / 'model_final.pth'}\n"
        "  your own data:    uv run train_net.py --config-file configs/small_data.yaml "
        "DATASETS.TRAIN \"('mine_train',)\" DATASETS.TEST \"('mine_val',)\"\n"
    )
    averaged = output / "model_ema_final.pth"
    if cfg.SOLVER.EMA.ENABLED and averaged.is_file():
        print(f"Averaged weights (SOLVER.EMA), evaluated in {output / 'ema'}: {averaged}")
    _print_previews(cfg)


def _print_previews(cfg: CfgNode) -> None:
    for name in cfg.DATASETS.TEST:
        picture = Path(cfg.OUTPUT_DIR) / f"preview_{name}.png"
        if cfg.TEST.PREVIEW_IMAGES and picture.is_file():
            print(f"Predictions beside ground truth: {picture}")


def _report(error: UserError, *, show: bool = True) -> int:
    """Prints an error in one line; returns its exit code."""
    if show:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code
