"""A run's output: a progress bar on a terminal, plain lines in a pipe, everything in log.txt."""

import logging
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from mask_rcnn_plus.errors import UserError

_LOGGERS = ("detectron2", "fvcore", "mask_rcnn_plus")

LOG_ONLY = {"log_only": True}
"""``extra`` of a log call whose record goes only to log.txt."""

# The messages of detectron2 and fvcore that go to the screen, besides warnings and errors.
_SHOWN = ("Starting training", "Overall training speed", "[Checkpointer] Loading from")


def setup_console(output_dir: str, rank: int) -> None:
    """Logs everything to ``output_dir/log.txt``, and what matters to the screen.

    Only rank 0 writes to the screen. Rank N > 0 logs to log.txt.rankN.
    """
    # A second run in one process (a notebook, a test) would log each line twice, and also into the
    # folder of the first run.
    setup_logger.cache_clear()
    # It warns of every machine with nvcc but without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for name in _LOGGERS:
        logging.getLogger(name).handlers.clear()
    # default_setup calls the first two with the same arguments, and then finds them in the cache.
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank)
    setup_logger(output_dir, distributed_rank=rank, name="mask_rcnn_plus")
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is not sys.stdout:
                # On a full disk logging would print a traceback for each line; the run reports it
                # once. setup_logger creates the handler, so it cannot be a subclass.
                handler.handleError = lambda record: None  # type: ignore[method-assign]
            elif isinstance(handler, logging.StreamHandler):
                handler.addFilter(_on_screen)
                if _is_terminal():
                    handler.setStream(DummyTqdmFile(sys.stdout))  # writes above the bar


def _on_screen(record: logging.LogRecord) -> bool:
    # An error that ends a run in one line needs no traceback on the screen.
    if record.exc_info and isinstance(record.exc_info[1], UserError | FloatingPointError):
        return False
    if getattr(record, "log_only", False):
        return False
    if record.name.endswith("utils.events"):  # the periodic lines of losses
        return not _is_terminal()
    ours = record.name.startswith("mask_rcnn_plus")
    return ours or record.levelno >= logging.WARNING or record.getMessage().startswith(_SHOWN)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Inside, a background thread that cannot write (TensorBoard's) ends without a traceback.

    The next checkpoint cannot be written either, which ends the run with an error message.
    """
    excepthook = threading.excepthook

    def ignore_os_errors(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            excepthook(args)

    threading.excepthook = ignore_os_errors
    try:
        yield
    finally:
        threading.excepthook = excepthook


class ProgressBar(HookBase):
    """Iterations, time left, loss and learning rate on one line; only on a terminal."""

    _bar: tqdm | None = None

    def before_train(self) -> None:
        if _is_terminal():
            self._bar = tqdm(
                desc="Training",
                total=self.trainer.max_iter,
                initial=self.trainer.start_iter,
                unit="it",
                dynamic_ncols=True,
            )

    def after_step(self) -> None:
        if self._bar is None:
            return
        if self.trainer.iter % 10 == 0:
            self._bar.set_postfix(self._metrics(), refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _metrics(self) -> Mapping[str, Any]:
        histories = self.trainer.storage.histories()
        metrics = {}
        if "total_loss" in histories:
            metrics["loss"] = f"{histories['total_loss'].median(20):.3f}"
        if "lr" in histories:
            metrics["lr"] = f"{histories['lr'].latest():.2g}"
        if torch.cuda.is_available():
            metrics["mem"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        return metrics


def _is_terminal() -> bool:
    # tqdm draws on standard error; some pseudo-terminals have no width.
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        return False
    return shutil.get_terminal_size(fallback=(0, 0)).columns > 0
