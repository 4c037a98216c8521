"""Videos are written and read back: frame size, rate, the last row and column; a full disk."""

import resource
from pathlib import Path

import cv2
import numpy as np
import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.predict import video
from mask_rcnn_tools.predict.video import set_frame_size, video_file
from tests import browser


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


def write(path: Path, frames: list[np.ndarray], rate: float = 25) -> list[str]:
    """Writes a video of the first frame's size; returns what was logged."""
    logged: list[str] = []
    with video_file(path, rate, frames[0].shape[:2], logged.append) as add:
        for image in frames:
            add(image)
    return logged


SIZES = [(121, 161), (121, 160), (120, 161), (33, 1281), (15, 17), (1, 1), (120, 160)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_frames_are_read_back(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "new" / "clip.mp4"
    sent = [frame(number, height, width) for number in range(14)]  # more than a group of pictures
    assert write(path, sent, 23.976) == []
    frames, rate = read_frames(path)
    assert len(frames) == 14 and rate == pytest.approx(23.976, abs=1e-3)
    for number, read in enumerate(frames):
        assert read.shape == (height, width, 3)
        difference = np.abs(read.astype(int) - sent[number])
        assert difference.mean() < 6
        # Padding would show as an extra line in a player.
        assert difference[-1].mean() < 12 and difference[:, -1].mean() < 12
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_all_key_frames_of_a_long_video_have_the_size(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write(path, [frame(number, 33, 47) for number in range(300)])
    frames, _ = read_frames(path)
    assert len(frames) == 300 and {f.shape for f in frames} == {(33, 47, 3)}


@pytest.mark.slow
def test_browsers_play_the_videos(tmp_path: Path) -> None:
    chromium = browser.find()
    if chromium is None:
        pytest.skip("Chromium is missing; on Debian: apt-get install chromium")
    for height, width in SIZES:
        path = tmp_path / f"{width}x{height}.mp4"
        write(path, [frame(number, height, width) for number in range(25)])
    videos = "".join(f"<video muted src='{w}x{h}.mp4'></video>" for h, w in SIZES)
    (tmp_path / "page.html").write_text(videos)
    script = """Promise.all([...document.querySelectorAll("video")].map(video => new Promise(
        resolve => {
            const done = () => resolve([
                video.readyState >= 2, video.videoHeight, video.videoWidth,
                Math.round(video.duration * 25)]);
            if (video.readyState >= 2 || video.error) done();
            else video.onloadeddata = video.onerror = done;
        })))"""
    with browser.started(chromium, tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html", width=1280)
        states = opened.evaluate(script)
    assert states == [[True, height, width, 25] for height, width in SIZES]


def test_unexpected_headers_are_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write(path, [frame(0, 32, 48)])
    before = path.read_bytes()
    assert not set_frame_size(path, (34, 48), (33, 48))
    assert path.read_bytes() == before
    for content in (b"", b"not a video, but long enough", b"\0\0\0\x08moov"):
        (tmp_path / "other").write_bytes(content)
        assert not set_frame_size(tmp_path / "other", (32, 48), (31, 47))


@pytest.mark.parametrize(
    ("codecs", "words"),
    [({"mp4v": "MPEG-4"}, ["does not play in browsers", "48 x 32 pixels"]), ({"none": "-"}, [])],
)
def test_an_opencv_without_vp9_says_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codecs: dict[str, str], words: list[str]
) -> None:
    monkeypatch.setattr(video, "_CODECS", codecs)
    path = tmp_path / "clip.mp4"
    if not words:
        with pytest.raises(UserError, match="no encoder"):
            write(path, [frame(0, 31, 47)])
        assert not list(tmp_path.iterdir())
        return
    logged = write(path, [frame(0, 31, 47)])
    assert len(logged) == len(words)
    assert all(word in line and str(path) in line for word, line in zip(words, logged, strict=True))
    assert read_frames(path)[0][0].shape == (32, 48, 3)


def test_a_frame_of_another_size_is_resized(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4", [frame(0, height, 48) for height in (32, 64, 32)])
    assert [f.shape for f in read_frames(tmp_path / "clip.mp4")[0]] == [(32, 48, 3)] * 3


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"of 20 frames are in it; is the disk full\?"):
            write(tmp_path / "clip.mp4", list(noise))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
