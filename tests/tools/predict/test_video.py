"""Videos are written and read back: frame size, rate, the last row and column; a full disk."""

import resource
from pathlib import Path

import cv2
import numpy as np
import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.predict.video import VideoFile, set_frame_size


def frame(number: int, height: int, width: int) -> np.ndarray:
    """A moving ramp of greys with white last rows and columns."""
    row = np.linspace(0, 150, width) + 5 * number
    image = np.repeat(np.repeat(row[None, :, None], height, 0), 3, 2).astype(np.uint8)
    image[-6:] = image[:, -6:] = 250
    return image


def read_frames(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, rate


@pytest.mark.parametrize(
    ("height", "width"), [(121, 161), (121, 160), (120, 161), (33, 1281), (15, 17), (120, 160)]
)
def test_frames_are_read_back(tmp_path: Path, height: int, width: int) -> None:
    logged: list[str] = []
    video = VideoFile(tmp_path / "new" / "clip.mp4", 23.976, (height, width), logged.append)
    for number in range(14):  # more than a group of pictures
        video.add(frame(number, height, width))
    video.close()
    frames, rate = read_frames(tmp_path / "new" / "clip.mp4")
    assert len(frames) == 14 and rate == pytest.approx(23.976, abs=1e-3) and not logged
    for number, read in enumerate(frames):
        assert read.shape == (height, width, 3)
        difference = np.abs(read.astype(int) - frame(number, height, width))
        assert difference.mean() < 6
        # Padding would show as an extra line in a player.
        assert difference[-1].mean() < 12 and difference[:, -1].mean() < 12


def test_unexpected_headers_are_not_changed(tmp_path: Path) -> None:
    video = VideoFile(tmp_path / "clip.mp4", 25, (32, 48), print)
    video.add(frame(0, 32, 48))
    video.close()
    before = (tmp_path / "clip.mp4").read_bytes()
    assert not set_frame_size(tmp_path / "clip.mp4", (34, 48), (33, 48))
    assert (tmp_path / "clip.mp4").read_bytes() == before
    for content in (b"", b"not a video, but long enough", b"\0\0\0\x08moov"):
        (tmp_path / "other").write_bytes(content)
        assert not set_frame_size(tmp_path / "other", (32, 48), (31, 47))


def test_a_size_that_could_not_be_corrected_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "mask_rcnn_tools.predict.video.set_frame_size"
    monkeypatch.setattr(path, lambda *_: False)
    logged: list[str] = []
    video = VideoFile(tmp_path / "clip.mp4", 25, (31, 47), logged.append)
    video.add(frame(0, 31, 47))
    video.close()
    assert logged == [
        f"{tmp_path / 'clip.mp4'} has 48 x 32 pixels: this OpenCV writes only even sides"
    ]
    assert read_frames(tmp_path / "clip.mp4")[0][0].shape == (32, 48, 3)


def test_a_frame_of_another_size_is_resized(tmp_path: Path) -> None:
    video = VideoFile(tmp_path / "clip.mp4", 25, (32, 48), print)
    for height in (32, 64, 32):
        video.add(frame(0, height, 48))
    video.close()
    assert [f.shape for f in read_frames(tmp_path / "clip.mp4")[0]] == [(32, 48, 3)] * 3


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    video = VideoFile(tmp_path / "clip.mp4", 25, (64, 64), print)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for image in noise:
            video.add(image)
        with pytest.raises(UserError, match=r"of 20 frames are in it; is the disk full\?"):
            video.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
