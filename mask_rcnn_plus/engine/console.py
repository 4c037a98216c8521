"""A run's output: a progress bar on a terminal, plain lines in a pipe, everything in log.txt."""

import contextlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.launch import lost_process
from mask_rcnn_plus.errors import UserError, reason

logger = logging.getLogger(__name__)

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
    for name in _LOGGERS:
        for handler in setup_logger(output_dir, distributed_rank=rank, name=name).handlers:
            if getattr(handler, "stream", None) is not sys.stdout:
                # A full disk must not print a traceback for each line; the run reports it once.
                handler.stream.reconfigure(encoding="utf-8", errors="backslashreplace")
                handler.setStream(_LastingStream(handler.stream))
            elif isinstance(handler, logging.StreamHandler):
                handler.addFilter(_on_screen)
                if _is_terminal():
                    handler.setStream(DummyTqdmFile(sys.stdout))  # writes above the bar


def _on_screen(record: logging.LogRecord) -> bool:
    if getattr(record, "log_only", False):
        return False
    # The error itself ends the run, in one line or with its traceback.
    if record.getMessage().startswith("Exception during training"):
        return False
    if record.name.endswith("utils.events"):  # the periodic lines of losses
        return not _is_terminal()
    # Names of parameters without weights; our checkpointer says it in one sentence.
    if record.name.startswith(("fvcore.common.checkpoint", "detectron2.checkpoint")):
        return record.levelno > logging.WARNING or record.getMessage().startswith(_SHOWN)
    ours = record.name.startswith("mask_rcnn_plus")
    return ours or record.levelno >= logging.WARNING or record.getMessage().startswith(_SHOWN)


@contextmanager
def in_one_line(problem: str) -> Iterator[None]:
    """Raises any error of detectron2, such as incompatible settings, as a UserError."""
    try:
        yield
    except (UserError, FloatingPointError):
        raise
    except Exception as error:
        full_disk = isinstance(error, OSError) and error.errno in saving.NO_WRITING
        if full_disk or lost_process(error):
            raise
        logger.error(problem, exc_info=True, extra=LOG_ONLY)
        raise UserError(
            f"{problem}: {type(error).__name__}: {reason(error, 300)} (traceback: see log.txt)"
        ) from error


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, output that nobody reads any more (``| head``, a closed terminal) ends no run."""
    with Path(os.devnull).open(
        "w", encoding="utf-8"
    ) as null:  # for a process that started without streams
        out, err = (_LastingStream(stream or null) for stream in (sys.stdout, sys.stderr))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
            try:
                yield
            finally:
                out.flush()
                err.flush()


class _LastingStream:
    """A text stream without errors: what cannot be written, is dropped."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with self._dropping():
            try:
                self._file.write(text)
            except UnicodeEncodeError:
                self._file.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._file.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Python writes its buffer once more at exit, and the rest of a line may follow.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._bar.close()  # else the time of the evaluation would count

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
    # tqdm draws on standard error; some pseudo-terminals have no width or height.
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        return False
    return min(shutil.get_terminal_size(fallback=(0, 0))) > 0
