"""Tools of the patches: probes, and changes that are local or temporary."""

import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import detectron2


def source(path: str) -> str:
    """The text of one of detectron2's files; empty if it does not exist.

    Args:
        path: relative to the detectron2 package, such as ``"engine/hooks.py"``.
    """
    file = Path(detectron2.__file__).parent / path
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@functools.cache
def has_extension() -> bool:
    """Whether detectron2's compiled operators load. Those built for another torch do not."""
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return False
    return True


def load(name: str) -> ModuleType:
    """Imports one of detectron2's modules, quietly.

    fvcore/nn/focal_loss.py:52,97 and modeling/box_regression.py:20,119 script functions on import.
    Every user would see FutureWarnings that name neither package, before anything has run.

    Args:
        name: the module's name within detectron2, such as ``"engine.hooks"``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
        return importlib.import_module(f"detectron2.{name}")


class View(ModuleType):
    """A module with some names replaced, for use in one importing module."""

    def __init__(self, original: ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__, original.__doc__)
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


class Stub(ModuleType):
    """Replaces a missing module. Using a name that it lacks raises an AttributeError."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name} is needed, but {self.__name__} is missing")


@contextmanager
def lent_module(module: ModuleType) -> Iterator[None]:
    """Makes a missing module importable, under its name, while the block runs."""
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
