"""Public names of a package that are imported when they are used."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def names_of(package: str, **modules: Iterable[str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package, which must not import torch to parse a command's arguments.

    Args:
        package: its name.
        modules: the public names of each of its modules.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
