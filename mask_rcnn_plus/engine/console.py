"""What a run shows: a progress bar on a terminal, plain lines when piped, everything in log.txt."""

import logging
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from mask_rcnn_plus.errors import UserError

_LOGGERS = ("detectron2", "fvcore", "mask_rcnn_plus")

# detectron2 opens every run with hundreds of lines. They belong into log.txt; on the screen, what
# they are is enough.
_LONG_MESSAGES = (
    "Contents of args.config_file",
    "Environment info:",
    "Model:",
    "Running with full config:",
)


def setup_console(output_dir: str, rank: int) -> None:
    """Sets up the loggers: the whole log in ``output_dir/log.txt``, the essence on the screen.

    Args:
        output_dir: folder of log.txt (of log.txt.rankN for rank N > 0).
        rank: of this process; only rank 0 writes on the screen.
    """
    # A second run in one process (a notebook, a test) would otherwise log each line twice, and
    # into the first run's folder too.
    setup_logger.cache_clear()
    for name in _LOGGERS:
        logging.getLogger(name).handlers.clear()
    # The first two to the letter as default_setup will call it: it then finds them cached.
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank)
    setup_logger(output_dir, distributed_rank=rank, name="mask_rcnn_plus")
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is not sys.stdout:
                # A full disk is said once, in words, not with a traceback for each line of log.txt.
                handler.handleError = lambda record: None  # type: ignore[method-assign]
            elif isinstance(handler, logging.StreamHandler):
                handler.addFilter(_is_news)
                handler.setFormatter(_ScreenFormatter(handler.formatter or logging.Formatter()))
                if _is_terminal():
                    handler.setStream(_AboveProgressBar(sys.stdout))  # type: ignore[arg-type]


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Within, a background thread that cannot write (TensorBoard's) ends without a traceback.

    What cannot be written is said, and ends the run, when the next checkpoint is saved.
    """
    before = threading.excepthook

    def note(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = note
    try:
        yield
    finally:
        threading.excepthook = before


class ProgressBar(HookBase):
    """Iterations, time left, loss and learning rate on one line; nothing unless on a terminal.

    Args:
        period: how many iterations the loss on the bar may be old.
    """

    def __init__(self, period: int = 10) -> None:
        self._period = period
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        if _is_terminal():
            self._bar = tqdm(
                desc="Training",
                total=trainer.max_iter,
                initial=trainer.start_iter,
                unit="it",
                dynamic_ncols=True,
            )

    def after_step(self) -> None:
        if self._bar is None:
            return
        if self.trainer.iter % self._period == 0:
            self._bar.set_postfix(self._figures(), refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _figures(self) -> Mapping[str, Any]:
        histories = self.trainer.storage.histories()
        figures = {}
        if "total_loss" in histories:
            figures["loss"] = f"{histories['total_loss'].median(20):.3f}"
        if "lr" in histories:
            figures["lr"] = f"{histories['lr'].latest():.2g}"
        if torch.cuda.is_available():
            figures["mem"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        return figures


class _AboveProgressBar:
    """A stream that moves a progress bar aside for each write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


def _is_terminal() -> bool:
    # Progress bars are drawn on standard error, as tqdm does; some pseudo-terminals have no width.
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        return False
    return shutil.get_terminal_size(fallback=(0, 0)).columns > 0


def _is_news(record: logging.LogRecord) -> bool:
    # What ends a run in one line needs no traceback on the screen.
    if record.exc_info and isinstance(record.exc_info[1], UserError | FloatingPointError):
        return False
    if getattr(record, "for_log_alone", False):
        return False
    # While a progress bar shows them, the periodic lines of losses are for log.txt alone.
    return not (_is_terminal() and record.name.endswith("utils.events"))


class _ScreenFormatter(logging.Formatter):
    """Names a long message where another formatter would print it whole."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        # Handlers share a record, and log.txt is to have the whole message: change a copy.
        record = logging.makeLogRecord(record.__dict__)
        if message.startswith(_LONG_MESSAGES):
            title = message.splitlines()[0].rstrip(":")
            record.msg, record.args = f"{title}: see log.txt", ()
        return self._formatter.format(record)
