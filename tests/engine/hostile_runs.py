"""Runs the command on each case of a list, each in a fork of a process that has imported all.

``python hostile_runs.py CASES.json FORBIDDEN SECONDS``: CASES is a list of argument lists. Prints a
JSON list of [exit code or -signal, standard error]. A fork that opens a file below FORBIDDEN ends
with 99, a fork that takes longer than SECONDS of processor time with -26 (SIGVTALRM). A fork can
allocate 16 GiB.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch

from mask_rcnn_plus.engine import main
from mask_rcnn_tools.check.before_run import check_data


def run(argv: list[str], forbidden: str, seconds: int) -> tuple[int, str]:
    """Returns the exit code, negative for a signal, and standard error."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

            def watch(event: str, arguments: tuple) -> None:
                if event == "open" and str(arguments[0]).startswith(forbidden):
                    os._exit(99)

            sys.addaudithook(watch)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (16 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            # Processor time, because the clock of a busy machine says nothing about the program.
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            code = 1
            try:
                code = main(argv, check_data=check_data)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode(errors="replace")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    # os._exit in a fork loses the traceback of an error, whose exit code is 1.
    print(json.dumps([run(case, sys.argv[2], int(sys.argv[3])) for case in cases]))
