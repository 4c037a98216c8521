"""Reads images and the frames of videos and cameras."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.prediction import to_bgr
from mask_rcnn_plus.prediction.images import BGR
from mask_rcnn_tools.predict.sources import Skip, Source

# The fraction of announced frames that may be missing: some videos announce too many.
_MISSING_FRAMES = 0.02

# Images of at least this many bytes (BGR) are read one by one.
_LARGE = 2**27


@dataclass(frozen=True)
class Frame:
    """An image, or a frame of a video."""

    source: Source
    index: int | None  # position in the video, from 0; None for an image
    image: BGR  # (H, W, 3), uint8
    rate: float = 0.0  # frames per second; 0 for an image

    @property
    def path(self) -> str:
        """The path of the image; for a frame of a video, with its index: "clip.mp4#12"."""
        return self.source.path if self.index is None else f"{self.source.path}#{self.index}"


def open_camera(number: str) -> Any:
    """Opens a camera, or raises a UserError."""
    camera = cv2.VideoCapture(int(number))
    if not camera.isOpened():
        raise UserError(
            f"camera {number} cannot be opened: it does not exist, or another program uses it (and "
            f"there is no file '{number}')"
        )
    return camera


def read_frames(
    sources: Sequence[Source], cameras: dict[str, Any], skip: Skip, *, sixteen_bit: str = "image"
) -> Iterator[Frame]:
    """Reads all images and frames, in order.

    Args:
        sources: the inputs, from ``find_sources``.
        cameras: number -> opened camera.
        skip: called with the reason for each file that cannot be read completely.
        sixteen_bit: as INPUT.SIXTEEN_BIT.
    """
    for source in sources:
        if source.kind == "image":
            try:
                yield Frame(source, None, to_bgr(source.path, sixteen_bit=sixteen_bit))
            except (UserError, OSError) as error:
                skip(str(error), 1)
        else:
            capture = cameras[source.path] if source.kind == "camera" else _open(source.path)
            yield from _read_video(source, capture, skip)


def _read_video(source: Source, capture: Any, skip: Skip) -> Iterator[Frame]:
    count = 0
    try:
        announced = _announced_frames(capture)
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 30.0
        while (frame := capture.read())[0]:
            yield Frame(source, count, frame[1], rate)
            count += 1
    except (cv2.error, MemoryError) as error:
        skip(f"{source.path}#{count} and the frames after it: {reason(error)}", 1)
        return
    finally:
        capture.release()
    if count == 0:
        skip(f"{source.path} is not a video that OpenCV can read", 1)
    elif source.kind == "camera":
        skip(f"camera {source.path} stopped after {count} frames", 1)
    elif announced - count > max(1, _MISSING_FRAMES * announced):
        skip(f"{source.path} ends after {count} of {announced} frames: the rest cannot be read", 1)


def _open(path: str) -> Any:
    """Opens a video. The result is not opened if OpenCV cannot read the file."""
    try:
        return cv2.VideoCapture(path)
    except UnicodeError:  # bytes that are not text
        return cv2.VideoCapture()


def _announced_frames(capture: Any) -> int:
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 2**31 else 0


def count_frames(sources: Sequence[Source]) -> int | None:
    """The number of images and frames that the files announce; None with a camera."""
    if any(source.kind == "camera" for source in sources):
        return None
    return sum(
        1 if source.kind == "image" else _announced_frames(_open(source.path)) for source in sources
    )


def prefetch_batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Splits frames into lists, and reads the next list while the caller uses the current one.

    Large images come one by one, and the next one is read only when the caller asks for it.
    """

    def read() -> list[Frame]:
        batch: list[Frame] = []
        while len(batch) < size and sum(f.image.size for f in batch) < _LARGE:
            frame = next(frames, None)
            if frame is None:
                break
            batch.append(frame)
        return batch

    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(read).result()
        while batch:
            large = sum(frame.image.size for frame in batch) >= _LARGE
            following = None if large else pool.submit(read)
            yield batch
            batch.clear()  # frees large images before the next ones are read
            batch = (following or pool.submit(read)).result()
