"""The command behind train_net.py."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.checks import DataCheck
from mask_rcnn_plus.engine.launch import launch
from mask_rcnn_plus.engine.setup import setup
from mask_rcnn_plus.engine.stops import Leave
from mask_rcnn_plus.engine.trainer import Trainer
from mask_rcnn_plus.engine.weights import TRUST_FLAG
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

_EXAMPLES = """
Examples:
  a first run, which needs no data and no GPU:
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
  go on with an interrupted run:
    train_net.py --resume --config-file ...

Exit codes:
    0  done
    2  a mistake in what was given
    3  training diverged; OUTPUT_DIR/divergence.pt has the batch
    4  a checkpoint could not be written; the last one is intact
    5  a data loader's worker died or hangs; the run is saved
  130  SIGINT (Ctrl-C), 143  SIGTERM: the step was finished and the run saved;
       a second signal ends it at once
"""


def main(argv: Sequence[str] | None = None, *, check_data: DataCheck | None = None) -> int:
    """Trains, or with ``--eval-only`` evaluates.

    Args:
        argv: command-line arguments; by default the process's own.
        check_data: runs on the data sets before the run, as DATA_CHECK asks for. A module-level
            function, since each process of a run calls it.

    Returns:
        the exit code: 0, or what _EXAMPLES says, after one line on standard error.
    """
    parser = default_argument_parser(epilog=_EXAMPLES)
    # Never a config key: whoever wrote a config must not decide whom its user trusts.
    parser.add_argument(
        TRUST_FLAG,
        action="store_true",
        help="read the file of MODEL.WEIGHTS as a full pickle, which may run any code",
    )
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        launch(partial(_run, check_data=check_data), args, resolve_device(cfg.MODEL.DEVICE))
    except UserError as error:
        # Before torchrun's processes know of each other, each of them gets here.
        refused = os.environ.get("LOCAL_RANK", "0") == "0"
        return _refuse(error) if refused else error.exit_code
    except Leave as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace, *, check_data: DataCheck | None) -> None:
    try:
        cfg = setup(args, check_data=check_data)
        _evaluate(cfg, args) if args.eval_only else _train(cfg, args)
    except UserError as error:
        if comm.get_world_size() == 1:
            raise
        # main() is in another process. What all processes refuse is one line a machine.
        own = isinstance(error, _OwnShareError)
        sys.exit(_refuse(error) if own or comm.get_local_rank() == 0 else error.exit_code)


def _train(cfg: CfgNode, args: argparse.Namespace) -> None:
    with _explaining("what the config describes cannot be built"):
        trainer = Trainer(cfg)
    trainer.checkpointer.trusted = _trusted(cfg, args)
    with _explaining("what the checkpoint holds cannot be used"):
        trainer.resume_or_load(resume=args.resume)
    with _sharing():
        trainer.train()
    if comm.is_main_process():
        _print_next_steps(cfg)


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    with _explaining("what the config describes cannot be built"):
        model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, strict=True)
    checkpointer.trusted = _trusted(cfg, args)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    with _sharing():
        results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
        _print_previews(cfg)


def _trusted(cfg: CfgNode, args: argparse.Namespace) -> str:
    # detectron2's own parser, which a caller may have used, does not know the option.
    return cfg.MODEL.WEIGHTS if getattr(args, "trust_checkpoint", False) else ""


class _OwnShareError(UserError):
    """About what this process alone has seen."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


@contextmanager
def _sharing() -> Iterator[None]:
    """Marks the errors of one process's share of the images, which no other process reports."""
    try:
        yield
    except UserError as error:
        raise _OwnShareError(error) from error


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turns whatever detectron2 raises on settings that do not go together into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logger.error(what, exc_info=True, extra={"for_log_alone": True})
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {type(error).__name__}: {reason} (where: see log.txt)") from error


def _print_next_steps(cfg: CfgNode) -> None:
    output = Path(cfg.OUTPUT_DIR)
    root = os.environ.get("DETECTRON2_DATASETS")
    where = f"DETECTRON2_DATASETS={root} " if root else ""
    print(
        "\nNext:\n"
        "  curves:           uv run tensorboard --logdir "
        f"{output}\n"
        f"  evaluate again:   {where}uv run train_net.py --config-file "
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


def _refuse(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
