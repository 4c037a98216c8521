"""Shared by all benchmarks: alternating timings, peak memory, arguments and reports."""

import argparse
import ctypes
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from mask_rcnn_tools.arguments import Parser, positive, require_device
from mask_rcnn_tools.files import prepare_output, write_file

Key = TypeVar("Key")
Result = TypeVar("Result")

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "--config-file": {"required": True, "metavar": "YAML"},
    "--device": {"choices": ("cpu", "cuda"), "default": "cpu"},
    "--threads": {"type": positive, "help": "CPU threads (default: chosen by torch)"},
    "--repeats": {"type": positive, "default": 7, "help": "timed turns of each (default: 7)"},
    "--output": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "also write the tables (Markdown) and their data (json) into this folder",
    },
    "--overwrite": {"action": "store_true", "help": "replace files of an earlier run"},
    "opts": {"nargs": "*", "metavar": "KEY VALUE", "help": "config keys, as for train_net.py"},
}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def add_arguments(parser: Parser, *names: str) -> None:
    """Adds arguments of ``_ARGUMENTS``, which several benchmarks share."""
    for name in names:
        parser.add_argument(name, **_ARGUMENTS[name])


def apply_arguments(arguments: argparse.Namespace, files: Sequence[str]) -> None:
    """Checks ``--device``, prepares ``--output`` for the files, and sets ``--threads``.

    Raises:
        UsageError: the device is missing, or the output cannot be written.
    """
    require_device(arguments.device)
    if arguments.output is not None:
        prepare_output(arguments.output, files, overwrite=arguments.overwrite)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def alternate(
    runs: Mapping[Key, Callable[[int], Result]],
    *,
    turns: int,
    warm_ups: int = 1,
    rotate: bool = False,
    enough: Callable[[int], bool] = lambda turns: False,
    label: str | None = None,
) -> dict[Key, list[Result]]:
    """Runs the implementations in turns, so that all of them see the same machine.

    Args:
        runs: implementation -> function that measures one run and returns the measurement. Its
            argument is the number of the turn, counted from the first warm-up.
        turns: how often each runs after the warm-ups.
        warm_ups: turns whose measurements are dropped.
        rotate: start each turn with the next implementation.
        enough: whether to stop after this many timed turns.
        label: the label of a progress bar on a terminal; None for no bar.

    Returns:
        the measurements of each implementation, one per timed turn.
    """
    keys = list(runs)
    results: dict[Key, list[Result]] = {key: [] for key in keys}
    hidden = label is None or not sys.stderr.isatty()
    count = (warm_ups + turns) * len(runs)
    with tqdm(total=count, desc=label, unit="run", disable=hidden, leave=False) as bar:
        for turn in range(warm_ups + turns):
            first = turn % len(keys) if rotate else 0
            for key in keys[first:] + keys[:first]:
                result = runs[key](turn)
                if turn >= warm_ups:
                    results[key].append(result)
                bar.update()
            if enough(turn + 1 - warm_ups):
                break
    return results


def clock(device: str, *, cpu_time: bool = False) -> float:
    """The time in milliseconds, after CUDA has finished its work.

    Args:
        device: where the timed code runs.
        cpu_time: on the CPU, this process's CPU time, which other processes hardly change.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif cpu_time:
        return 1e3 * time.process_time()
    return 1e3 * time.perf_counter()


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """The peak memory of a call in MiB, beyond what was in use before.

    On CUDA this is the memory that PyTorch allocates; on the CPU, the resident memory after freed
    memory has returned to the system. None if the system does not report it (only Linux does).
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # resets the recorded peak
        before = _resident_mib("VmRSS")
        run()
        return _resident_mib("VmHWM") - before
    except (OSError, AttributeError, IndexError):
        return None


def _resident_mib(field: str) -> float:
    values = re.findall(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(values[0]) / 1024


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, align_right: bool = False
) -> list[str]:
    """The lines of a Markdown table; ``align_right`` aligns all columns but the first."""
    rule = ["---", *["---:" if align_right else "---"] * (len(head) - 1)]
    return [markdown_row(cells) for cells in (head, rule, *rows)]


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    # A class may be called "a|b".
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def number(value: float | None, form: str = "{:.1f}", missing: str = "-") -> str:
    """The number as text, or ``missing`` for None."""
    return missing if value is None else form.format(value)


class Report:
    """Prints Markdown while a benchmark runs; collects it and its data for the output files.

    Attributes:
        data: the contents of the json file: command, environment and what the benchmark adds.
    """

    def __init__(self, command: str, environment: dict[str, Any]) -> None:
        self.data: dict[str, Any] = {"command": command, "environment": environment}
        self._lines: list[str] = []
        self.add(f"`{command}`", "", facts(environment), "")

    def add(self, *lines: str) -> None:
        """Prints lines of Markdown."""
        self._lines += lines
        # A progress bar on standard error may share the terminal.
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()

    def write(self, markdown: Path, data: Path) -> None:
        """Writes the Markdown and the json file.

        Raises:
            UsageError: a file cannot be written.
        """
        write_file(markdown, "\n".join(self._lines) + "\n")
        write_file(data, json.dumps(self.data, indent=1) + "\n")


def facts(environment: Mapping[str, object]) -> str:
    """Hardware, versions and settings, on one line."""
    return "; ".join(f"{name} {value}" for name, value in environment.items())
