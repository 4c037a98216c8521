"""Random draws that depend on what they are for, not on what was drawn before."""

import hashlib
import random

import numpy as np
import torch


def key(*words: int | str) -> int:
    """A number that looks random and is the same whenever the words are.

    Args:
        words: what the draw is for, as ``(seed, "sample", position)``.

    Returns:
        64 bits of BLAKE2b of the words, so that a later NumPy or torch changes nothing.
    """
    return _keys(*words)[0]


def seed_all(*words: int | str) -> None:
    """Seeds Python's, NumPy's and torch's global generators for one purpose.

    Args:
        words: what the draws are for, as ``(seed, "step", iteration, rank)``.
    """
    for_python, for_numpy, for_torch = _keys(*words)
    random.seed(for_python)
    np.random.seed([for_numpy & 0xFFFFFFFF, for_numpy >> 32])
    # torch.manual_seed would, without a GPU, note down a stack trace each time.
    torch.default_generator.manual_seed(for_torch)
    if torch.cuda.is_initialized():
        # Of all GPUs: the model's need not be the current one.
        torch.cuda.manual_seed_all(for_torch)


def _keys(*words: int | str) -> tuple[int, int, int]:
    # Three, since Python and NumPy turn one and the same number into the same draws.
    text = "/".join(map(str, words))
    digest = hashlib.blake2b(text.encode(), digest_size=24).digest()
    first, second, third = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16))
    return first, second, third
