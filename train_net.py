"""Trains or evaluates a Mask R-CNN by a config: see ``python train_net.py --help``."""

import os
import sys
import tempfile

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
