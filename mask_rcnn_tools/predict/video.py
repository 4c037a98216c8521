"""Videos of any frame size, odd sides too, written by OpenCV.

OpenCV's writer cuts odd sides to even ones, for the sake of other codecs. MPEG-4 (ISO/IEC 14496-2)
codes whole blocks of 16 x 16 pixels and says in its header how much of them is the picture, so the
same frames serve either size: they are written with even sides, and the headers are set right in
the end.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cv2

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.prediction.images import BGR

# MPEG-4 in MP4: OpenCV's packages can write it everywhere.
_CODE, VIDEO_SUFFIX = "mp4v", ".mp4"
_VISUAL_LAYER = b"\0\0\1\x20"  # the start code of a video object layer's header
_SIZE_IN_ENTRY = 28  # bytes from the entry's name "mp4v" to its width


class VideoFile:
    """A video that is written frame by frame.

    Args:
        path: of the file, an MP4.
        rate: frames a second.
        size: (H, W) in pixels.
        say: prints a line for the user.

    Raises:
        UserError: OpenCV has no encoder.
    """

    def __init__(
        self, path: Path, rate: float, size: tuple[int, int], say: Callable[[str], None]
    ) -> None:
        self._path, self._size, self._say = path, size, say
        self._even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self._count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        code = cv2.VideoWriter_fourcc(*_CODE)
        self._writer = cv2.VideoWriter(str(path), code, rate, self._even[::-1])
        if not self._writer.isOpened():
            raise UserError(
                f"{path} cannot be written: this OpenCV has no encoder for {_CODE}; "
                "--no-pictures predicts without"
            )

    def add(self, frame: BGR) -> None:
        """Writes a frame, (H, W, 3); one of another size is resized, as a player would do it."""
        if frame.shape[:2] != self._size:
            frame = cv2.resize(frame, self._size[::-1], interpolation=cv2.INTER_AREA)
        below, right = (even - side for even, side in zip(self._even, self._size, strict=True))
        if below or right:
            frame = cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REPLICATE)
        self._writer.write(frame)
        self._count += 1

    def close(self) -> None:
        """Ends the file, and says where it has not the frames' size.

        Raises:
            UserError: the disk refused some of it, which OpenCV does not say by itself.
        """
        self._writer.release()
        exact = self._even == self._size or set_frame_size(self._path, self._even, self._size)
        capture: Any = cv2.VideoCapture(str(self._path))
        count = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # -1 of what is no video
        capture.release()
        if count != self._count:
            raise UserError(
                f"cannot write {self._path}: {count} of {self._count} frames are in it; is the "
                "disk full?"
            )
        if not exact:
            height, width = self._even
            self._say(f"{self._path} has {width} x {height} pixels: this OpenCV writes even sides")


def set_frame_size(path: Path, there: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Changes the size of the frames in the headers of an MP4 file with MPEG-4 video.

    Args:
        path: of the file.
        there: (H, W) in pixels as its headers have it.
        wanted: (H, W), of as many blocks of 16 x 16 pixels.

    Returns:
        whether the headers were as expected; if not, the file is as it was.
    """
    with path.open("r+b") as file:
        start, movie = _movie_header(file)
        old, new = (
            (struct.pack(">II", width << 16, height << 16), struct.pack(">HH", width, height))
            for height, width in (there, wanted)
        )
        track = movie.find(old[0], movie.find(b"tkhd") + 4)
        entry = movie.find(b"mp4v") + _SIZE_IN_ENTRY
        layer = movie.find(_VISUAL_LAYER, movie.find(b"esds", entry)) + len(_VISUAL_LAYER)
        end = movie.find(b"\0\0\1", layer)
        bits = "".join(f"{byte:08b}" for byte in movie[layer:end])
        if (
            min(track, end) < 0
            or movie[entry : entry + 4] != old[1]
            or bits.count(_bits(there)) != 1
        ):
            return False
        bits = bits.replace(_bits(there), _bits(wanted))
        for position, content in (
            (track, new[0]),
            (entry, new[1]),
            (layer, bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))),
        ):
            file.seek(start + position)
            file.write(content)
    return True


def _bits(size: tuple[int, int]) -> str:
    """Width and height in the header of a video object layer (14496-2, section 6.2.3)."""
    height, width = size
    return f"1{width:013b}1{height:013b}1"


def _movie_header(file: BinaryIO) -> tuple[int, bytes]:
    """Where an MP4's box "moov" begins, and its content; empty where it has none."""
    start = 0
    while len(head := file.read(16)) >= 8:
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:  # a box of more than 4 GiB
            length = struct.unpack(">Q", head[8:])[0]
        if kind == b"moov":
            file.seek(start)
            return start, file.read(length)
        if length < 8:
            break
        start += length
        file.seek(start)
    return 0, b""
