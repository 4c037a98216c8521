"""Writes videos of any frame size with OpenCV, including odd sides.

OpenCV's writer crops odd sides to even ones, because some codecs need that. MPEG-4 (ISO/IEC
14496-2) does not: it codes blocks of 16 x 16 pixels, and its header says which part of them to
show. So this module writes frames with even sides and corrects the header at the end.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cv2

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.prediction.images import BGR

# MPEG-4 in MP4, which all of OpenCV's packages can write.
_CODE, VIDEO_SUFFIX = "mp4v", ".mp4"
_VISUAL_LAYER = b"\0\0\1\x20"  # start code of the header of a video object layer
_SIZE_OFFSET = 28  # bytes from the name "mp4v" of a sample entry to its width


class VideoFile:
    """An MP4 file that is written frame by frame.

    Args:
        path: the file.
        rate: frames per second.
        size: (H, W) in pixels.
        log: prints a line for the user.

    Raises:
        UserError: OpenCV has no encoder.
    """

    def __init__(
        self, path: Path, rate: float, size: tuple[int, int], log: Callable[[str], None]
    ) -> None:
        self._path, self._size, self._log = path, size, log
        self._even = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        code = cv2.VideoWriter_fourcc(*_CODE)
        self._writer = cv2.VideoWriter(str(path), code, rate, self._even[::-1])
        if not self._writer.isOpened():
            raise UserError(
                f"cannot write {path}: this OpenCV has no encoder for {_CODE}; use --no-pictures"
            )

    def add(self, frame: BGR) -> None:
        """Writes a frame, (H, W, 3), resized if it has another size."""
        if frame.shape[:2] != self._size:
            frame = cv2.resize(frame, self._size[::-1], interpolation=cv2.INTER_AREA)
        below, right = self._even[0] - self._size[0], self._even[1] - self._size[1]
        self._writer.write(cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REPLICATE))
        self._count += 1

    def close(self) -> None:
        """Finishes the file. Logs if the header could not be corrected to an odd side.

        Raises:
            UserError: frames are missing; OpenCV does not report a full disk.
        """
        self._writer.release()
        exact = self._even == self._size or set_frame_size(self._path, self._even, self._size)
        capture: Any = cv2.VideoCapture(str(self._path))
        count = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # -1 if it is not a video
        capture.release()
        if count != self._count:
            raise UserError(
                f"cannot write {self._path}: {count} of {self._count} frames are in it; is the "
                "disk full?"
            )
        if not exact:
            height, width = self._even
            self._log(
                f"{self._path} has {width} x {height} pixels: this OpenCV writes only even sides"
            )


def set_frame_size(path: Path, current: tuple[int, int], new: tuple[int, int]) -> bool:
    """Changes the frame size in the headers of MPEG-4 video.

    Args:
        path: the MP4 file.
        current: (H, W) in pixels that the headers contain.
        new: (H, W) with the same number of blocks of 16 x 16 pixels.

    Returns:
        whether the headers were as expected; if not, the file is unchanged.
    """
    with path.open("r+b") as file:
        start, movie = _movie_header(file)
        # The size in the track header, as 16.16 fixed point, and in the sample entry.
        old_sizes, new_sizes = (
            (struct.pack(">II", width << 16, height << 16), struct.pack(">HH", width, height))
            for height, width in (current, new)
        )
        track = movie.find(old_sizes[0], movie.find(b"tkhd") + 4)
        entry = movie.find(b"mp4v") + _SIZE_OFFSET
        layer = movie.find(_VISUAL_LAYER, movie.find(b"esds", entry)) + len(_VISUAL_LAYER)
        end = movie.find(b"\0\0\1", layer)
        bits = "".join(f"{byte:08b}" for byte in movie[layer:end])
        if (
            min(track, end) < 0
            or movie[entry : entry + 4] != old_sizes[1]
            or bits.count(_bits(current)) != 1
        ):
            return False
        bits = bits.replace(_bits(current), _bits(new))
        header = int(bits, 2).to_bytes(len(bits) // 8, "big")
        for position, content in ((track, new_sizes[0]), (entry, new_sizes[1]), (layer, header)):
            file.seek(start + position)
            file.write(content)
    return True


def _bits(size: tuple[int, int]) -> str:
    """The bits of width and height in a video object layer's header (14496-2, section 6.2.3)."""
    height, width = size
    return f"1{width:013b}1{height:013b}1"


def _movie_header(file: BinaryIO) -> tuple[int, bytes]:
    """The position and content of an MP4's box "moov"; empty if it is missing."""
    start = 0
    while len(head := file.read(16)) >= 8:
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:  # a box above 4 GiB
            length = struct.unpack(">Q", head[8:])[0]
        if kind == b"moov":
            file.seek(start)
            return start, file.read(length)
        if length < 8:
            break
        start += length
        file.seek(start)
    return 0, b""
