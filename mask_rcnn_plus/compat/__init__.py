"""detectron2 0.6 on today's torch, NumPy, Pillow, setuptools and Python."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    # detectron2 is not a dependency: users choose one of its two distributions.
    raise ModuleNotFoundError(
        "detectron2 is not installed; mask_rcnn_plus is a plugin for it, and "
        "docs/installation.md says how to install both",
        name="detectron2",
    ) from None

from mask_rcnn_plus.compat.patches import apply

__all__ = ["apply"]
