"""Writes checkpoints completely or not at all, and finds an intact one to resume from.

The SHA-256 of a checkpoint NAME.pth is beside it in NAME.pth.sha256, as ``sha256sum -c`` reads it.
A save first writes a temporary file, flushes it to the disk, and reads and compares it. It then
writes the digest, together with that of the old file; renames the temporary file; writes the digest
without the old one; and writes the pointer ``last_checkpoint``. Whenever this is interrupted, the
folder has a complete checkpoint with a matching digest.
"""

import contextlib
import errno
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch

from mask_rcnn_plus.engine.weights import explain, read_torch
from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.files import file_digest, replacing

_PART = ".part"  # ends the names of temporary files
_POINTER = "last_checkpoint"
_MAX_TEXT = 4096  # bytes of a pointer or digest file
# The operating system's errors that only the user can fix.
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class SaveError(UserError):
    """A checkpoint could not be written."""

    exit_code = 4


def save(data: dict[str, Any], path: Path) -> None:
    """Writes data with ``torch.save``; at any moment the file is the old one or the new one.

    Raises:
        SaveError: the file cannot be written; the old file is unchanged.
    """
    part = path.with_name(path.name + _PART)
    try:
        with part.open("wb") as file:
            writer = _HashingWriter(file)
            torch.save(data, writer)  # type: ignore[arg-type]
            if writer.error is not None:
                raise writer.error
            to_disk(file)
        digest = writer.hash.hexdigest()
        if file_digest(part) != digest:
            raise OSError(None, "the file reads back differently from what was written")
        old = (_stored_digests(path) or [file_digest(path)]) if path.exists() else []
        _write_text(_digest_file(path), "".join(f"{d}  {path.name}\n" for d in [digest, *old]))
        part.replace(path)
        _write_text(_digest_file(path), f"{digest}  {path.name}\n")
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise failure(path, error) from error


def point_to(path: Path) -> None:
    """Makes a checkpoint the one that ``--resume`` uses.

    Raises:
        SaveError: the pointer cannot be written; the old pointer is unchanged.
    """
    pointer = path.with_name(_POINTER)
    try:
        _write_text(pointer, path.name)
        _sync_folder(path.parent)
    except OSError as error:
        raise failure(pointer, error) from error


def failure(path: Path, error: OSError) -> SaveError:
    """The error to raise when a file of a run cannot be written."""
    last = last_saved(path.parent)
    intact = f"the last checkpoint, {last.name}, is intact; " if last and last.is_file() else ""
    return SaveError(
        f"cannot save '{path}': {reason(error)}; {intact}free space or repair the folder, then "
        "--resume"
    )


def write_text(path: Path, text: str) -> None:
    """Replaces a text file of a run; at any moment it is the old one or the new one.

    Raises:
        SaveError: the file cannot be written; the old one is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_text(path, text)
    except OSError as error:
        raise failure(path, error) from error


def prune(folder: Path, keep: int) -> None:
    """Keeps only the newest periodic checkpoints (``model_0000009.pth``); 0 keeps all."""
    if keep < 1:
        return
    periodic = [p for p in _newest_first(folder) if re.fullmatch(r"model_\d{7,}\.pth", p.name)]
    last = last_saved(folder)
    for path in periodic[keep:]:
        if path != last:
            # The digest last, since a checkpoint without one loads unverified.
            with contextlib.suppress(OSError):
                path.unlink()
                _digest_file(path).unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Removes the temporary files of a killed run."""
    for part in folder.glob(f"*{_PART}"):
        if part.name.removesuffix(_PART).endswith((".pth", ".sha256", _POINTER)):
            with contextlib.suppress(OSError):
                part.unlink()


def candidates(folder: Path) -> list[Path]:
    """The checkpoints to resume from, best first: the last one saved, then from new to old.

    A file without a digest may be a download; it only counts if ``last_checkpoint`` names it.
    Averaged weights (``model_ema_``) never count.
    """
    last = last_saved(folder)
    others = [
        path
        for path in _newest_first(folder)
        if path != last and has_digest(path) and not path.name.startswith("model_ema_")
    ]
    return others if last is None else [last, *others]


def choose(folder: Path) -> tuple[Path | None, list[str]]:
    """The best intact checkpoint of a run, and the faults of the better candidates."""
    faults: list[str] = []
    for path in candidates(folder):
        if not (fault := damage(path)):
            return path, faults
        faults.append(f"{path.name} {fault}")
    return None, faults


def none_sound(folder: Path, faults: list[str]) -> UserError:
    """The error to raise when every candidate has a fault."""
    return UserError(
        f"--resume: cannot load any checkpoint in '{folder}': {'; '.join(faults)}; start again "
        "without --resume"
    )


def has_digest(path: Path) -> bool:
    """Whether the SHA-256 of a checkpoint is beside it."""
    return _digest_file(path).is_file()


def last_saved(folder: Path) -> Path | None:
    """The checkpoint of the folder that ``last_checkpoint`` names; the file may be missing."""
    try:
        # Only the name, so that a pointer cannot leave the folder.
        name = Path(_read_text(folder / _POINTER).strip()).name
    except OSError:
        return None
    return folder / name if name and name.isprintable() else None


def damage(path: Path) -> str:
    """The fault of a checkpoint, for a message after its name; "" for an intact one.

    A file without a digest beside it only has to be readable.
    """
    if not path.is_file():
        return "is missing"
    try:
        digests = _stored_digests(path)
        if not digests:
            read_torch(path)
        elif file_digest(path) not in digests:
            return f"is damaged: its SHA-256 is not the one in {_digest_file(path).name}"
    except Exception as error:
        return f"cannot be read: {explain(error)}"
    return ""


def read_seed(folder: Path) -> int | None:
    """The seed in the newest readable checkpoint of a folder; None if there is none."""
    for path in candidates(folder):
        with contextlib.suppress(Exception):
            seed = read_torch(path, mapped=True)["trainer"]["data"]["seed"]
            if type(seed) is int and 0 <= seed < 2**31:
                return seed
    return None


def to_disk(file: Any) -> None:
    """Waits until the content of an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        # Reading the file again then reads the disk, not the cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _HashingWriter:
    """A file for ``torch.save`` that also computes the SHA-256.

    torch's C++ code crashes if ``write`` raises, so this keeps the first error instead.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                self.hash.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Does nothing: ``to_disk`` flushes the file."""


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _stored_digests(path: Path) -> list[str]:
    return re.findall(r"^[0-9a-f]{64}\b", _read_text(_digest_file(path)), re.MULTILINE)


def _read_text(path: Path) -> str:
    """The start of a small file; "" if it is missing or a pipe, which would block."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_MAX_TEXT).decode(errors="replace")


def _newest_first(folder: Path) -> list[Path]:
    """The .pth files, newest first."""
    ages = []
    for path in folder.glob("*.pth"):
        with contextlib.suppress(OSError):
            ages.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(ages, reverse=True)]
