"""What a config value may be: rules that say it in words and test it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value has to be: in words, after "it must be", and as a test."""

    words: str
    allows: Callable[[Any], bool]


MOST = 2**31 - 1
MOST_SIDE = 2**15 - 1  # OpenCV's for an image
# Far above what models have and far below what would end in the system killing the process.
MOST_CHANNELS = 2**16
MOST_LAYERS = 100


def integer(least: int, most: int = MOST) -> Rule:
    """From ``least`` to ``most``."""
    words = f"{least} or more" if most == MOST else f"an integer of {least} to {most}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)


def number(least: float, most: float = math.inf, *, above: bool = False) -> Rule:
    """From ``least`` (with ``above``: from above it) to ``most``, both finite."""
    if most == math.inf:
        words = f"above {least:g}" if above else f"{least:g} or more"
    else:
        words = f"above {least:g} and at most {most:g}" if above else f"{least:g} to {most:g}"

    def allows(value: Any) -> bool:
        if type(value) not in (int, float) or not abs(value) < math.inf:
            return False
        return (value > least if above else value >= least) and value <= most

    return Rule(words, allows)


def one_of(*choices: Any) -> Rule:
    """One of these values, of the same type."""
    return Rule(
        ", ".join(str(choice) for choice in choices[:-1]) + f" or {choices[-1]}", _in(choices)
    )


def _in(choices: Sequence[Any]) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in choices)


def either(first: Rule, second: Rule) -> Rule:
    """What one of two rules allows."""
    return Rule(
        f"{first.words}, or {second.words}",
        lambda value: first.allows(value) or second.allows(value),
    )


def list_of(
    item: Rule, *, least: int = 1, lengths: Sequence[int] = (), rising: bool = False
) -> Rule:
    """A list or tuple of values that a rule allows, of one of some lengths or at least one."""
    count = " or ".join(str(length) for length in lengths) if lengths else f"{least} or more"
    order = ", each above the one before" if rising else ""

    def allows(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and (len(value) in lengths if lengths else len(value) >= least)
            and all(item.allows(one) for one in value)
            and (not rising or all(a < b for a, b in pairwise(value)))
        )

    return Rule(f"a list of {count} values, each {item.words}{order}", allows)
