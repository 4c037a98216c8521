"""Imports the public names of a package only when they are used."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def names_of(package: str, **modules: Iterable[str]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package that must not import torch to parse arguments.

    Args:
        package: the name of the package.
        modules: module of the package -> its public names.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return find
