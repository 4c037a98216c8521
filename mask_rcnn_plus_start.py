"""Where the command mask-rcnn-plus starts.

Outside the package, whose import needs a sound torch and detectron2, because the doctor has to run
where they are not.
"""

import importlib.util
import sys
import types

PACKAGE = "mask_rcnn_plus"
# What needs no torch: importing it takes seconds.
_BARE = ([], ["-h"], ["--help"], ["--version"], ["doctor"])


def main() -> int:
    """Runs the command line; see ``mask_rcnn_plus.tools.cli``."""
    if sys.argv[1:2] in _BARE:
        _lend_package()
    from mask_rcnn_plus.tools.cli import main

    return main()


def _lend_package() -> None:
    """Puts a package of the same files in its place, whose import runs nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or PACKAGE in sys.modules:
        return
    package = types.ModuleType(PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[PACKAGE] = package


if __name__ == "__main__":
    sys.exit(main())
