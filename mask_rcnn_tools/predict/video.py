"""Writes videos that browsers play, of any frame size, with OpenCV.

OpenCV's writer crops odd sides to even ones. VP9 stores the size in pixels, so this module writes
frames with even sides and corrects the headers at the end.
"""

import mmap
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.prediction.images import BGR
from mask_rcnn_tools.files import complete_file

# In MP4. OpenCV's packages contain an encoder of VP9; some other builds have one of H.264 instead.
# All can write MPEG-4, which browsers do not play.
_CODECS = {"vp09": "VP9", "avc1": "H.264", "mp4v": "MPEG-4"}
_IN_BROWSERS = ("vp09", "avc1")
_SIZE_OFFSET = 28  # bytes from the name of a sample entry to its width
# The first bytes of a key frame of VP9 (bitstream specification, section 6.2), then its size.
_KEY_FRAME = re.compile(rb"[\x80-\x83]\x49\x83\x42")


@contextmanager
def video_file(
    path: Path, rate: float, size: tuple[int, int], log: Callable[[str], None]
) -> Iterator[Callable[[BGR], None]]:
    """An MP4 file that is written frame by frame, and takes its name when it is complete.

    Args:
        path: the file.
        rate: frames per second.
        size: (H, W) in pixels.
        log: prints a line for the user.

    Yields:
        a function that writes a frame, (H, W, 3), resized if it has another size.

    Raises:
        UserError: OpenCV has no encoder; or, at the end, frames are missing: OpenCV does not report
            a full disk.
    """
    even = size[0] + size[0] % 2, size[1] + size[1] % 2
    count = 0

    def add(frame: BGR) -> None:
        nonlocal count
        if frame.shape[:2] != size:
            frame = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA)
        below, right = even[0] - size[0], even[1] - size[1]
        writer.write(cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REPLICATE))
        count += 1

    with complete_file(path) as part:
        codec, writer = _open_writer(part, rate, even)
        try:
            yield add
        finally:
            writer.release()
        exact = even == size or (codec == "vp09" and set_frame_size(part, even, size))
        capture: Any = cv2.VideoCapture(str(part))
        written = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # -1 if it is not a video
        capture.release()
        if written != count:
            raise UserError(
                f"cannot write {path}: {written} of {count} frames are in it; is the disk full?"
            )
    if codec not in _IN_BROWSERS:
        log(f"{path} does not play in browsers: this OpenCV writes neither VP9 nor H.264")
    if not exact:
        log(f"{path} has {even[1]} x {even[0]} pixels: this OpenCV writes only even sides")


def _open_writer(path: Path, rate: float, size: tuple[int, int]) -> tuple[str, Any]:
    """The first codec that works, and its writer."""
    for codec in _CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, size[::-1])
        if writer.isOpened():
            return codec, writer
    raise UserError(
        f"cannot write {path}: this OpenCV has no encoder for {', '.join(_CODECS.values())}; use "
        "--no-pictures"
    )


def set_frame_size(path: Path, current: tuple[int, int], new: tuple[int, int]) -> bool:
    """Changes the frame size in the headers of VP9 video.

    Args:
        path: the MP4 file.
        current: (H, W) in pixels that the headers contain.
        new: (H, W) with the same number of blocks of 8 x 8 pixels.

    Returns:
        whether the headers were as expected; if not, the file is unchanged.
    """
    if path.stat().st_size == 0:
        return False
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        movie = data.rfind(b"moov")
        # The size in the track header, as 16.16 fixed point, and in the sample entry.
        track = data.find(_track_size(current), data.find(b"tkhd", movie))
        entry = data.find(b"vp09", data.find(b"stsd", movie)) + _SIZE_OFFSET
        frames = [
            match.end()
            for match in _KEY_FRAME.finditer(data)
            if _frame_size(data[match.end() : match.end() + 5]) == current
        ]
        if movie < 0 or track < 0 or data[entry : entry + 4] != _entry_size(current) or not frames:
            return False
        data[track : track + 8] = _track_size(new)
        data[entry : entry + 4] = _entry_size(new)
        for start in frames:
            bits = int.from_bytes(data[start : start + 5], "big") & ~(0xFFFFFFFF << 4)
            bits |= (new[1] - 1) << 20 | (new[0] - 1) << 4
            data[start : start + 5] = bits.to_bytes(5, "big")
    return True


def _track_size(size: tuple[int, int]) -> bytes:
    return struct.pack(">II", size[1] << 16, size[0] << 16)


def _entry_size(size: tuple[int, int]) -> bytes:
    return struct.pack(">HH", size[1], size[0])


def _frame_size(header: bytes) -> tuple[int, int]:
    """(H, W) from the bytes after the sync code: 4 bits; width - 1, height - 1 in 16 bits each."""
    bits = int.from_bytes(header, "big") >> 4
    return (bits & 0xFFFF) + 1, (bits >> 16 & 0xFFFF) + 1
