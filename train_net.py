"""Trains or evaluates a Mask R-CNN by a config: see ``python train_net.py --help``."""

import importlib.util
import os
import runpy
import sys
import tempfile
from pathlib import Path

try:
    os.getcwd()  # noqa: PTH109
except FileNotFoundError:  # torch would abort
    print("error: the working directory was deleted: change to another", file=sys.stderr)
    sys.exit(2)

# A container started with --user has no home folder, where libraries keep caches.
if os.path.expanduser("~") in ("~", "/"):  # noqa: PTH111
    os.environ["HOME"] = f"{tempfile.gettempdir()}/mask_rcnn_plus_{os.getuid()}"
    os.environ.setdefault("USER", str(os.getuid()))

# Before torch: OpenMP threads that wait soon sleep. By default they spin for milliseconds, which
# slows down every process on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if __name__ == "__main__":
    # Answers --help and mistakes without importing the package, which takes many seconds.
    (package,) = importlib.util.find_spec("mask_rcnn_plus").submodule_search_locations
    runpy.run_path(str(Path(package, "engine", "arguments.py")))["parse"]()

# Outside of "main", because the processes of several GPUs import this file first.
import mask_rcnn_plus  # noqa: F401  (repairs detectron2 before anything imports it)
from mask_rcnn_plus.engine import main

try:
    from mask_rcnn_tools.check.before_run import check_data
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("mask_rcnn_tools"):
        raise
    check_data = None  # the plugin trains and evaluates without the tools

if __name__ == "__main__":
    sys.exit(main(check_data=check_data))
