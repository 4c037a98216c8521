"""Random seeds that depend on what is drawn, not on what was drawn before."""

import hashlib
import random

import numpy as np
import torch


def seed_for(*purpose: int | str) -> int:
    """A pseudorandom number of 64 bits that depends only on its purpose, not on NumPy or torch.

    Args:
        purpose: what is drawn, such as ``(seed, "sample", position)``.
    """
    return _seeds(*purpose)[0]


def seed_all(*purpose: int | str) -> None:
    """Seeds the global random generators of Python, NumPy and torch.

    Args:
        purpose: what is drawn next, such as ``(seed, "step", iteration, rank)``.
    """
    for_python, for_numpy, for_torch = _seeds(*purpose)
    random.seed(for_python)
    np.random.seed([for_numpy & 0xFFFFFFFF, for_numpy >> 32])
    # Without a GPU, torch.manual_seed would record a stack trace each time.
    torch.default_generator.manual_seed(for_torch)
    if torch.cuda.is_initialized():
        # Seeds all GPUs, since the model may not be on the current one.
        torch.cuda.manual_seed_all(for_torch)


def _seeds(*purpose: int | str) -> tuple[int, int, int]:
    # Three different seeds: from the same one, Python and NumPy would draw the same numbers.
    text = "/".join(map(str, purpose))
    digest = hashlib.blake2b(text.encode(), digest_size=24).digest()
    first, second, third = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16))
    return first, second, third
