"""Runs the command on each file of a list, each in a fork of a process that has imported all.

``python hostile_runs.py CASES.json FORBIDDEN SECONDS``: CASES is a list of argument lists. Prints a
json list of [exit code or -signal, what went to standard error]. A fork that opens a file below
FORBIDDEN ends with 99, one that takes longer than SECONDS of the processor with -26 (SIGVTALRM).
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

from mask_rcnn_plus.engine import main


def run(argv: list[str], forbidden: str, seconds: int) -> tuple[int, str]:
    """The exit code, negative for a signal, and standard error."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

            def watch(event: str, arguments: tuple) -> None:
                if event == "open" and str(arguments[0]).startswith(forbidden):
                    os._exit(99)

            sys.addaudithook(watch)
            # Of the processor, since a busy machine's clock says nothing about the program.
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            code = 1
            try:
                code = main(argv)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode(errors="replace")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    # A traceback, which os._exit in the fork would lose, counts as the failure that it is.
    print(json.dumps([run(case, sys.argv[2], int(sys.argv[3])) for case in cases]))
