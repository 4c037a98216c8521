"""detectron2 0.6 on today's torch, NumPy, Pillow and setuptools."""


def apply() -> None:
    """Patches what is broken in the installed detectron2."""
