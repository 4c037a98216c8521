"""The command train_net.py."""

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.engine import lock, saving
from mask_rcnn_plus.engine.arguments import by_uv, parse, train_command
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.checks import DataCheck
from mask_rcnn_plus.engine.console import in_one_line, lasting_output
from mask_rcnn_plus.engine.launch import LostProcessError, launch, lost_process
from mask_rcnn_plus.engine.setup import setup
from mask_rcnn_plus.engine.stops import Interrupt
from mask_rcnn_plus.engine.trainer import Trainer
from mask_rcnn_plus.errors import UserError, reason


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
    try:
        args = parse(argv)
    except SystemExit as end:
        return int(end.code or 0)
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
        with in_one_line("the evaluation failed"):
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
    environment = f"DETECTRON2_DATASETS={shlex.quote(root)} " if root else ""
    train, tensorboard = train_command(), "uv run tensorboard" if by_uv() else "tensorboard"
    folder, config, weights = (
        shlex.quote(str(output / name)) for name in ("", "config.yaml", "model_final.pth")
    )
    print(
        "\nNext:\n"
        f"  curves:           {tensorboard} --logdir {folder}, or curves.png there\n"
        f"  evaluate again:   {environment}{train} --config-file {config} --eval-only "
        f"MODEL.WEIGHTS {weights}\n"
        f"  your own data:    {train} --config-file configs/small_data.yaml "
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
