"""Checkpoint files that are there whole or not at all, whatever happens while they are written.

A checkpoint NAME.pth has its SHA-256 beside it in NAME.pth.sha256, as ``sha256sum -c`` reads it.
The order of the writes: the data under a temporary name, to the disk, read again and compared; the
digest, for a moment together with that of the file to be replaced; the renaming; the digest alone;
the pointer ``last_checkpoint``. At each byte of it a whole checkpoint is there and is known to be.
"""

import contextlib
import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mask_rcnn_plus.engine.durable import (
    PART,
    HashingWriter,
    file_digest,
    sync_folder,
    to_disk,
    write_small,
)
from mask_rcnn_plus.engine.plain_pickle import PlainPickleError
from mask_rcnn_plus.engine.torch_archive import MOST_BYTES, read_torch
from mask_rcnn_plus.errors import UserError

_POINTER = "last_checkpoint"
_MOST_TEXT = 4096  # bytes of a pointer or digest file
# What the operating system says when it is not for the program to mend.
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class SaveError(UserError):
    """A checkpoint could not be written."""

    exit_code = 4


def save(data: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that the file is the old one or the new one at any moment.

    Args:
        data: what ``torch.save`` takes.
        path: its file, which may exist.

    Raises:
        SaveError: it cannot be written; what was there is as it was.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            writer = HashingWriter(file)
            torch.save(data, writer)
            if writer.error is not None:
                raise writer.error
            to_disk(file)
        digest = writer.digest()
        if file_digest(part) != digest:
            raise OSError(None, "what was written reads back differently")
        before = (_stored(path) or [file_digest(path)]) if path.exists() else []
        write_small(_beside(path), "".join(f"{one}  {path.name}\n" for one in [digest, *before]))
        part.replace(path)
        write_small(_beside(path), f"{digest}  {path.name}\n")
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise explained(path, error) from error


def point_to(path: Path) -> None:
    """Makes a checkpoint the one that ``--resume`` takes.

    Raises:
        SaveError: the pointer cannot be written; it points where it did.
    """
    try:
        write_small(path.with_name(_POINTER), path.name)
        sync_folder(path.parent)
    except OSError as error:
        raise explained(path.with_name(_POINTER), error) from error


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest periodic checkpoints (``model_0000009.pth``).

    Args:
        folder: of the run.
        keep: how many to leave; 0 for all.
    """
    if keep < 1:
        return
    periodic = [p for p in _by_age(folder) if re.fullmatch(r"model_\d{7,}\.pth", p.name)]
    spared = last_saved(folder)
    for path in periodic[keep:]:
        if path != spared:
            # The digest last: a checkpoint without one still loads, but is no match for damage.
            with contextlib.suppress(OSError):
                path.unlink()
                _beside(path).unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Removes what a killed run had half written."""
    for part in folder.glob(f"*{PART}"):
        if part.name.removesuffix(PART).endswith((".pth", ".sha256", _POINTER)):
            with contextlib.suppress(OSError):
                part.unlink()


def candidates(folder: Path) -> list[Path]:
    """The checkpoints to resume from, best first: the last one saved, then others by age.

    A file without a digest beside it counts only if ``last_checkpoint`` names it: it may be a
    download. Averaged weights (``model_ema_``) have no run to go on with.
    """
    pointed = last_saved(folder)
    found = [
        path
        for path in _by_age(folder)
        if path != pointed and _beside(path).is_file() and not path.name.startswith("model_ema_")
    ]
    return found if pointed is None else [pointed, *found]


def choose(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of a run, and what is wrong with those before it."""
    faults = []
    for path in candidates(folder):
        if not (fault := damage(path)):
            return path, faults
        faults.append(f"{path.name} {fault}")
    return None, faults


def none_sound(folder: Path, faults: list[str]) -> UserError:
    """What there is to say where all have a fault."""
    reasons = "; ".join(faults)
    remedy = "start anew without --resume"
    return UserError(f"--resume: no checkpoint in '{folder}' can be loaded: {reasons}; {remedy}")


def has_digest(path: Path) -> bool:
    """Whether the SHA-256 of a checkpoint lies beside it."""
    return _beside(path).is_file()


def last_saved(folder: Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names, which may be missing; never outside."""
    try:
        name = Path(_text(folder / _POINTER).strip()).name
    except OSError:
        return None
    return folder / name if name and name.isprintable() else None


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, or "" where nothing is known to be.

    Args:
        path: of a file; one without a digest beside it is only looked at.
    """
    if not path.is_file():
        return "is missing"
    try:
        stored = _stored(path)
        if path.stat().st_size > MOST_BYTES:
            return f"is larger than {MOST_BYTES >> 30} GiB"
        if stored:
            if file_digest(path) in stored:
                return ""
            return f"is damaged: its SHA-256 is not the one in {_beside(path).name}"
        read_torch(path)
    except Exception as error:
        kind = "" if isinstance(error, PlainPickleError) else f"{type(error).__name__} "
        return f"cannot be read: {kind}{' '.join(str(error).split())[:100]}"
    return ""


def read_seed(folder: Path) -> int | None:
    """The seed of the run that a folder holds.

    Args:
        folder: with checkpoints or none.

    Returns:
        what its newest readable checkpoint says; None if there is none, or it does not say.
    """
    for path in candidates(folder):
        with contextlib.suppress(Exception):
            seed = read_torch(path, mapped=True)["trainer"]["data"]["seed"]
            if type(seed) is int and 0 <= seed < 2**31:
                return seed
    return None


def first_not_finite(tensors: Mapping[str, Any]) -> str:
    """The name of the first tensor of floats with an infinity or a NaN in it; "" if none has."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        # One pass; the sum of finite numbers may overflow, and then each is looked at.
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            return name
    return ""


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _stored(path: Path) -> list[str]:
    return re.findall(r"^[0-9a-f]{64}\b", _text(_beside(path)), re.MULTILINE)


def _text(path: Path) -> str:
    """What a small file says; "" where there is none, or a pipe, which would never end."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_MOST_TEXT).decode(errors="replace")


def _by_age(folder: Path) -> list[Path]:
    """The .pth files, newest first."""
    ages = []
    for path in folder.glob("*.pth"):
        with contextlib.suppress(OSError):
            ages.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(ages, reverse=True)]


def explained(path: Path, error: OSError) -> SaveError:
    """What there is to say when a file of a run cannot be written."""
    reason = error.strerror or str(error)
    last = last_saved(path.parent)
    intact = f"the last checkpoint, {last.name}, is intact; " if last and last.is_file() else ""
    return SaveError(
        f"cannot save '{path}': {reason}; {intact}free the space or mend the folder, then --resume"
    )
