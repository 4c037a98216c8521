"""Locks an OUTPUT_DIR, so that two runs cannot use it. The lock ends with its process."""

import errno
import logging
import os
import platform
import threading
from pathlib import Path

from mask_rcnn_plus.errors import UserError, reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_FILE = ".lock"
# Folder -> the open lock file and the thread that locked it. Forked processes do not hold locks.
_held: dict[str, tuple[int, threading.Thread]] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


def acquire(folder: str) -> None:
    """Locks the folder of a run. Does nothing if this thread has locked it already.

    Uses a record lock, because loader workers would inherit a ``flock`` and keep it for seconds
    after their run was killed. Logs a warning if the system or the file system has no locks.

    Raises:
        UserError: another run uses the folder, in another process or in a thread of this one.
        OSError: the lock file cannot be opened.
    """
    key, thread = os.path.realpath(folder), threading.current_thread()
    if key in _held:
        file, holder = _held[key]
        if holder is not thread and holder.is_alive():
            raise _in_use(folder, f"the thread '{holder.name}' of this process")
        _held[key] = file, thread
        return
    file = os.open(Path(folder, _FILE), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has no fcntl locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder_name = os.read(file, 200).decode(errors="replace").strip()
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(folder, holder_name or "another process") from error
        logger.warning(
            f"OUTPUT_DIR '{folder}' cannot be locked ({reason(error)}): do not start a second run "
            "in it"
        )
        return
    _held[key] = file, thread
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    except OSError:
        pass  # only the message needs the content; on a full disk, the run itself reports the error


def release() -> None:
    """Unlocks all folders that this thread has locked."""
    for key, (file, thread) in list(_held.items()):
        if thread is threading.current_thread():
            del _held[key]
            os.close(file)


def _in_use(folder: str, holder: str) -> UserError:
    return UserError(
        f"OUTPUT_DIR '{folder}' is in use by {holder}: wait until it ends, or set another folder"
    )
