"""mask-rcnn-plus predict: inputs, outputs, errors and exit codes."""

import csv
import json
import os
import resource
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from mask_rcnn_plus import UserError
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.predict import frames
from mask_rcnn_tools.predict import outputs as predict_outputs
from mask_rcnn_tools.predict import run as predict_run
from mask_rcnn_tools.predict.layout import fitting
from mask_rcnn_tools.predict.sources import find_sources


@pytest.fixture(scope="module")
def weights(trained: Path) -> str:
    return str(trained / "model_final.pth")


@pytest.fixture(scope="module", autouse=True)
def _one_model(weights: str) -> None:
    """Reuses predictors with the same config, because building one takes longer than predicting."""
    built = {}

    def cached(cfg: object, **options: object) -> object:
        key = (str(cfg), *sorted(options.items()))
        if key not in built:
            built[key] = predictor(cfg, **options)
        return built[key]

    predictor = predict_run.BatchPredictor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_run, "BatchPredictor", cached)
        yield


def random_image(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: photos/{a,b}/x.png and photos/y.jpg."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a/x.png", "b/x.png", "y.jpg")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "photos" / name), random_image(number))
    return tmp_path


def write_video(path: Path, frames: int, rate: float, size: tuple[int, int]) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 * number, np.uint8))
    writer.release()


def read_video(path: Path) -> tuple[int, float, tuple[int, int]]:
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]:
        count += 1
    size = (capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    return count, capture.get(cv2.CAP_PROP_FPS), size


def run(weights: str, *arguments: str) -> int:
    common = ["--weights", weights, "--device", "cpu", "--score-threshold", "0.1"]
    return main(["predict", *common, *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["predict", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.slow
def test_weights_and_an_image_are_enough(folder: Path, weights: str) -> None:
    code = "import sys; from mask_rcnn_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "predict", "--weights", weights, "photos/y.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 image with " in done.stdout and "images/s" in done.stdout
    assert cv2.imread("output/predictions/y.jpg").shape == (6 * 64, 6 * 80, 3)


def test_all_outputs_agree(folder: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos" / "z.jpg").write_text("not an image")
    given = ["photos/a/x.png", "photos/b/x.png", "photos", "photos/*.jpg"]
    assert run(weights, *given, "--output", "out", "--json", "--csv", "--cutouts") == 1
    captured = capsys.readouterr()
    assert "skipped: photos/z.jpg is not an image" in captured.err and "1 skipped" in captured.out

    # Each file once; the second x.png gets another name. Small images are drawn enlarged.
    assert cv2.imread("out/y.jpg").shape == (6 * 64, 6 * 80, 3)
    drawn = {path.name for path in (folder / "out").iterdir() if path.suffix in (".png", ".jpg")}
    assert drawn == {"x.png", "x_2.png", "y.jpg"}
    assert (cv2.imread("photos/a/x.png") == random_image(0)).all()

    with Path("out/objects.csv").open() as file:
        rows = list(csv.DictReader(file))
    coco = COCO("out/images.json")
    results = coco.loadRes("out/predictions.json")
    assert [i["file_name"] for i in coco.loadImgs(sorted(coco.imgs))] == [
        *("photos/a/x.png", "photos/b/x.png", "photos/y.jpg")
    ]
    assert [c["name"] for c in coco.loadCats([1, 2, 3])] == ["circle", "square", "triangle"]
    detections = list(results.anns.values())
    assert len(rows) == len(detections) > 0
    for row, detection in zip(rows, detections, strict=True):
        assert row["image"] == coco.imgs[detection["image_id"]]["file_name"]
        assert row["class"] == coco.cats[detection["category_id"]]["name"]
        assert float(row["score"]) == pytest.approx(detection["score"], abs=1e-4)
        x, y, w, h = detection["bbox"]
        corners = [float(row[key]) for key in ("x0", "y0", "x1", "y1")]
        np.testing.assert_allclose(corners, [x, y, x + w, y + h], atol=0.01)
        mask = results.annToMask(detection)
        assert int(row["area"]) == mask.sum()
        if mask.any():
            ys, xs = np.nonzero(mask)
            centroid = [float(row["centroid_x"]), float(row["centroid_y"])]
            np.testing.assert_allclose(centroid, [xs.mean() + 0.5, ys.mean() + 0.5], atol=0.01)
            name = Path(row["image"]).stem + ("_2" if "/b/" in row["image"] else "")
            path = f"out/cutouts/{name}_{int(row['object']):03}_{row['class']}.png"
            cutout = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            assert (cutout[:, :, 3] > 0).sum() == mask.sum()
            image = cv2.imread(row["image"])
            inside = cutout[:, :, 3] > 0
            assert (cutout[inside][:, :3] == image[mask > 0]).all()


def test_existing_files_are_replaced_only_with_overwrite_and_inputs_never(
    folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--weights", weights, "photos/y.jpg"]
    assert "is an input" in refusal(capsys, *given, "--output", "photos", "--overwrite")
    (folder / "out").mkdir()
    (folder / "out" / "y.jpg").write_text("mine")
    assert "out/y.jpg exists" in refusal(capsys, *given, "--output", "out")
    assert Path("out/y.jpg").read_text() == "mine"
    assert run(weights, "photos/y.jpg", "--output", "out", "--overwrite") == 0
    assert cv2.imread("out/y.jpg") is not None


def test_classes_max_detections_and_score_threshold(folder: Path, weights: str) -> None:
    def objects(*options: str) -> list[dict]:
        given = ["photos", "--recursive", "--no-pictures", "--json", "--overwrite", *options]
        assert run(weights, *given) == 0
        return json.loads(Path("output/predictions/predictions.json").read_text())

    everything = objects()
    category = min(o["category_id"] for o in everything)
    classes = ["--classes", ("circle", "square", "triangle")[category - 1]]
    kept = objects(*classes)
    assert {o["category_id"] for o in kept} == {category}
    assert len(kept) >= sum(o["category_id"] == category for o in everything)
    limited = objects(*classes, "--max-detections", "1")
    assert len(limited) == len({o["image_id"] for o in kept})
    best = objects("--max-detections", "1")
    assert len(best) == 3
    for image in range(1, 4):
        scores = [o["score"] for o in everything if o["image_id"] == image]
        assert [o["score"] for o in best if o["image_id"] == image] == pytest.approx([max(scores)])
    median = sorted(o["score"] for o in everything)[len(everything) // 2]
    above = objects("--score-threshold", str(median))
    assert 0 < len(above) < len(everything) and all(o["score"] >= median for o in above)


def test_like_uses_the_ids_of_a_coco_json(
    folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = {
        "images": [{"id": 70, "file_name": "a/x.png"}, {"id": 80, "file_name": "b/x.png"}],
        "categories": [
            {"id": 10 + n, "name": name} for n, name in enumerate(("triangle", "square", "circle"))
        ],
    }
    Path("gt.json").write_text(json.dumps(truth))
    given = ["--no-pictures", "--json", "--like", "gt.json"]
    assert run(weights, "photos/b/x.png", *given) == 0
    results = json.loads(Path("output/predictions/predictions.json").read_text())
    images = json.loads(Path("output/predictions/images.json").read_text())
    assert {result["image_id"] for result in results} == {80}
    assert [(c["id"], c["name"]) for c in images["categories"]] == [
        *((12, "circle"), (11, "square"), (10, "triangle"))
    ]
    truth["images"][1]["file_name"] = "b\\x.png"
    truth["categories"][0]["name"] = " triangle"
    for encoding in ("utf-8-sig", "utf-16"):
        Path("gt.json").write_text(json.dumps(truth), encoding=encoding)
        assert run(weights, "photos/b/x.png", *given, "--overwrite") == 0
        assert json.loads(Path("output/predictions/predictions.json").read_text()) == results
    common = ["--weights", weights, "--output", "other"]
    Path("bad.json").write_text('{"categories": [{"name": "circle", "id": 1e999}], "images": []}')
    bad = ["--no-pictures", "--json", "--like", "bad.json"]
    assert "not a COCO json" in refusal(capsys, *common, "photos/y.jpg", *bad)
    assert "y.jpg is not in it" in refusal(capsys, *common, "photos/y.jpg", *given)


@pytest.mark.parametrize("size", [(96, 64), (75, 65)])
def test_videos_keep_frames_rate_and_size(
    folder: Path, weights: str, size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = size[0] % 2 == 1
    if odd:
        # Only OpenCV's own Motion JPEG writer supports odd sides.
        code = cv2.VideoWriter_fourcc(*"MJPG")
        writer = cv2.VideoWriter("clip.avi", cv2.CAP_OPENCV_MJPEG, code, 30, size)
        for number in range(7):
            writer.write(np.full((size[1], size[0], 3), 20 * number, np.uint8))
        writer.release()
    else:
        write_video(folder / "clip.mp4", 7, 29.97, size)
    clip = "clip.avi" if odd else "clip.mp4"
    given = [clip, "--output", "out", "--json", "--batch-size", "3"]
    assert run(weights, *given, "--score-threshold", "1") == 0
    assert capsys.readouterr().err == ""
    count, rate, shape = read_video(folder / "out" / "clip.mp4")
    assert (count, shape) == (7, size)
    assert rate == pytest.approx(30 if odd else 29.97, abs=0.001)
    images = json.loads(Path("out/images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [f"{clip}#{n}" for n in range(7)]


def test_a_truncated_video_is_reported(
    folder: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(folder / "clip.mp4", 4, 25, (64, 64))
    Path("broken.mp4").write_bytes(b"not a video")
    monkeypatch.setattr(frames, "_announced_frames", lambda _: 10)
    assert run(weights, "broken.mp4", "clip.mp4", "photos/y.jpg", "--output", "out") == 1
    err = capsys.readouterr().err
    assert "broken.mp4 is not a video" in err and "clip.mp4 ends after 4 of 10 frames" in err
    assert read_video(folder / "out" / "clip.mp4")[0] == 4 and Path("out/y.jpg").exists()


def test_a_camera_ends_with_ctrl_c(
    folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Camera:
        frames = 0

        def get(self, _: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, np.ndarray]:
            self.frames += 1
            if self.frames > 5:
                raise KeyboardInterrupt
            return True, random_image(self.frames)

        def release(self) -> None:
            pass

    monkeypatch.setattr(predict_run, "open_camera", lambda _: Camera())
    assert run(weights, "0", "--output", "out", "--json", "--batch-size", "1") == 0
    assert read_video(folder / "out" / "camera_0.mp4")[0] == 5
    assert len(json.loads((folder / "out" / "images.json").read_text())["images"]) == 5


def test_slice_and_overlap(folder: Path, weights: str) -> None:
    cv2.imwrite("large.png", random_image(9, 120, 200))
    given = ["large.png", "--slice", "64", "--overlap", "0.25", "--output", "out", "--json"]
    assert run(weights, *given) == 0
    results = json.loads(Path("out/predictions.json").read_text())
    assert results and all(r["segmentation"]["size"] == [120, 200] for r in results)
    assert max(r["bbox"][0] for r in results) > 100


def test_find_sources(folder: Path) -> None:
    def names(*inputs: str, recursive: bool = False) -> list[tuple[str, str]]:
        sources, _ = find_sources(inputs, recursive=recursive, output=Path("photos/out"))
        return [(source.path, source.name) for source in sources]

    assert names("photos") == [("photos/y.jpg", "y")]
    (folder / "stacks").mkdir()
    for ending in ("gif", "jp2"):
        (folder / "stacks" / f"{ending}.{ending}").write_bytes(b"")
    assert (
        names("stacks")
        == names("stacks/*")
        == [("stacks/gif.gif", "gif"), ("stacks/jp2.jp2", "jp2")]
    )
    (folder / "photos" / "out").mkdir()
    (folder / "photos" / "out" / "y.jpg").write_bytes(b"")
    # Resource forks of macOS, and thumbnails of other programs.
    (folder / "photos" / ".thumbnails").mkdir()
    for name in ("._y.jpg", "a/._x.png", ".thumbnails/y.jpg"):
        (folder / "photos" / name).write_bytes(b"\0\5\x16\7")
    assert names("photos/*") == names("photos") == [("photos/y.jpg", "y")]
    inside = [("photos/a/x.png", "a/x"), ("photos/b/x.png", "b/x"), ("photos/y.jpg", "y")]
    assert names("photos", recursive=True) == inside
    assert names("photos/**/*.jpg", "photos/y.jpg") == [("photos/y.jpg", "y")]
    assert names("photos/a/x.png", "photos/*/x.png") == [
        ("photos/a/x.png", "x"),
        ("photos/b/x.png", "x_2"),
    ]


def test_other_files_of_a_folder_are_counted_and_named(
    folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.heic", "b.HEIC", "clip.mp4", "README", "Thumbs.db", ".DS_Store", "deep/c.heic"):
        (folder / "photos" / name).parent.mkdir(exist_ok=True)
        (folder / "photos" / name).write_bytes(b"")
    os.mkfifo(folder / "photos" / "pipe.png")
    (folder / "photos" / "gone.jpg").symlink_to("nowhere")
    assert run(weights, "photos", "--output", "photos/out") == 1
    captured = capsys.readouterr()
    note, line = captured.err.splitlines()
    assert note.startswith("note: ") and "(a, b, deep)" in note and "--recursive" in note
    assert "'photos'" in line and "2 .heic (a.heic, ...)" in line and "1 .mp4 (clip.mp4)" in line
    assert "README" in line and "pipe.png" in line and "gone.jpg" in line
    assert "Thumbs" not in line and "DS_Store" not in line and "6 skipped" in captured.out
    # The drawings of an earlier run are not counted.
    _, ((_, count),) = find_sources(["photos"], recursive=True, output=Path("photos/out"))
    assert count == 7
    _, ((_, count),) = find_sources(["photos/*"], recursive=False, output=Path("photos/out"))
    assert count == 5  # the video is read


def test_links_in_circles_end(folder: Path) -> None:
    for name in ("one", "two", "a/three"):
        (folder / "photos" / name).symlink_to(folder / "photos")
    (folder / "photos" / "self.png").symlink_to("self.png")
    for given in ("photos", "photos/**/*", "photos/**"):
        sources, ((message, _),) = find_sources([given], recursive=True, output=Path("out"))
        assert [s.path for s in sources] == ["photos/a/x.png", "photos/b/x.png", "photos/y.jpg"]
        assert "self.png" in message
    assert "one" in find_sources(["photos"], recursive=True, output=Path("out"))[1][0][0]


@pytest.mark.parametrize("name", ["self", "self.png"])
@pytest.mark.parametrize("target", ["circle", "too long"])
@pytest.mark.parametrize("given", ["photos", "photos/*"])
def test_a_link_that_leads_nowhere_does_not_end_the_run(
    folder: Path, name: str, target: str, given: str
) -> None:
    (folder / "photos" / name).symlink_to(name if target == "circle" else "x" * 300)
    sources, left_out = find_sources([given], recursive=False, output=Path("out"))
    assert [s.path for s in sources] == ["photos/y.jpg"]
    assert any(name in message and count == 1 for message, count in left_out)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the model raise an error for images of a width."""

    def install(error: BaseException, width: int) -> None:
        build = predict_run.BatchPredictor

        def built(cfg: object, **options: object) -> object:
            predictor = build(cfg, **options)

            def predict(images: list[np.ndarray]) -> object:
                if any(image.shape[1] == width for image in images):
                    raise error
                return predictor(images)

            vars(predict).update(vars(predictor))
            return predict

        monkeypatch.setattr(predict_run, "BatchPredictor", built)

    return install


@pytest.mark.parametrize(
    "error", [ValueError("height and width must be > 0"), MemoryError(), RuntimeError("too large")]
)
def test_an_image_on_which_the_model_fails_is_skipped(
    folder: Path,
    weights: str,
    failing: Callable[..., None],
    error: Exception,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cv2.imwrite("photos/bad.png", random_image(1, 3, 200))
    failing(error, 200)
    assert run(weights, "photos", "photos/a", "--output", "out", "--json") == 1
    captured = capsys.readouterr()
    assert "photos/bad.png (200 x 3 pixels)" in captured.err and str(error) in captured.err
    assert "2 images" in captured.out and "1 skipped" in captured.out
    assert {p.name for p in Path("out").iterdir()} == {
        *("x.png", "y.jpg", "predictions.json", "images.json")
    }


def test_an_image_that_cannot_be_drawn_is_named(
    folder: Path,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(predict_outputs, "draw_styled", fail)
    assert run(weights, "photos", "--output", "out", "--json") == 1
    assert "photos/y.jpg cannot be drawn: too large" in capsys.readouterr().err
    assert cv2.imread("out/y.jpg").shape == (64, 80, 3)
    assert len(json.loads(Path("out/images.json").read_text())["images"]) == 1


def test_very_long_names(folder: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    for letter in ("m" * 250, "m" * 249 + "n", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 120):
        cv2.imwrite(f"photos/{letter}.png", random_image(3))
    assert run(weights, "photos", "--output", "out", "--json", "--cutouts") == 0
    images = json.loads(Path("out/images.json").read_text())["images"]
    results = json.loads(Path("out/predictions.json").read_text())
    counts = [result["segmentation"]["counts"].encode() for result in results]
    masks = [{"size": [64, 80], "counts": count} for count in counts]
    not_empty = int((mask_util.area(masks) > 0).sum())
    assert len(images) == 4 and len(list(Path("out/cutouts").iterdir())) == not_empty > 0
    assert len(list(Path("out").glob("*.png"))) == 3
    path = Path("x") / f"{'a' * 300}.png"
    assert len(fitting(path).name) == 255 and fitting(path) != fitting(path.with_stem("a" * 301))
    capsys.readouterr()
    assert "File name too long" in refusal(capsys, "--weights", weights, f"{'a' * 300}.jpg")


@pytest.mark.slow
def test_many_files_need_few_descriptors(folder: Path, weights: str) -> None:
    for number in range(40):
        cv2.imwrite(f"photos/a/{number}.png", random_image(number, 32, 32))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
    try:
        assert run(weights, "photos", "--recursive", "--output", "out", "--json", "--csv") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("most", [0, 300, 5_000])
def test_a_full_disk_leaves_no_incomplete_file(
    folder: Path, weights: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(folder / "clip.mp4", 3, 25, (64, 64))
    Path("out").mkdir()
    Path("out/objects.csv").write_text("of an earlier run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    outputs = ["--output", "out", "--overwrite", "--json", "--csv", "--cutouts"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        assert run(weights, "photos", "clip.mp4", "--recursive", *outputs) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "out" in line and "File too large" in line
    written = [p for p in Path("out").rglob("*") if p.is_file() and p.suffix != ".csv"]
    assert all(cv2.imread(str(path)) is not None for path in written)
    assert Path("out/objects.csv").read_text() == "of an earlier run"


def test_ctrl_c_leaves_complete_files_of_what_is_finished(
    folder: Path, weights: str, failing: Callable[..., None]
) -> None:
    cv2.imwrite("photos/last.png", random_image(1, 64, 200))
    failing(KeyboardInterrupt(), 200)
    given = ["photos/y.jpg", "photos/last.png", "--batch-size", "1", "--json", "--csv"]
    assert run(weights, *given, "--output", "out") == 130
    assert [i["file_name"] for i in json.loads(Path("out/images.json").read_text())["images"]] == [
        "photos/y.jpg"
    ]
    rows = Path("out/objects.csv").read_text().splitlines()
    assert len(rows) - 1 == len(json.loads(Path("out/predictions.json").read_text()))
    assert not [p for p in Path("out").iterdir() if "part" in p.name]


def test_names_of_classes_may_contain_commas() -> None:
    composed = unicodedata.normalize("NFC", "caf\u00e9")
    names = ["cat", "screw, M4", "screw", " dog", composed, "M4"]

    def ids(*given: str) -> list[int] | None:
        return predict_run._class_ids(given, names)

    assert ids("cat,screw, M4") == [0, 1] and ids("screw", "M4") == [2, 5]
    assert ids("cat, screw ,dog") == [0, 2, 3]
    assert ids(unicodedata.normalize("NFD", composed)) == [4]
    with pytest.raises(UserError, match="class 'M5'"):
        ids("screw, M5")


def test_a_hint_at_tiles_for_large_images(
    folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite("large.png", random_image(1, 300, 400))
    given = ["large.png", "large.png", "photos/y.jpg", "--no-pictures", "--csv", "--overwrite"]
    assert run(weights, *given) == 0
    captured = capsys.readouterr()
    assert captured.err.count("hint: large.png") == 1 and "--slice 64" in captured.err
    assert "of score 0.1 or more" in captured.out
    assert run(weights, *given, "--slice", "64") == 0
    assert run(weights, *given[2:]) == 0
    assert "hint" not in capsys.readouterr().err


@pytest.mark.slow
def test_opencv_prints_nothing(folder: Path, weights: str) -> None:
    code = "import sys; from mask_rcnn_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "predict", "--weights", weights, "99"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain)
    assert done.returncode == 2
    assert done.stderr.startswith("error: camera 99") and done.stderr.count("\n") == 1


def test_a_wrong_argument_gives_a_one_line_error(
    folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ("--weights", weights, "photos/y.jpg")
    (folder / "void").mkdir()
    (folder / "notes.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to("circle")
    for arguments, words in (
        (("--weights", weights, "phots"), "'phots' does not exist; did you mean 'ph"),
        (("--weights", weights, "void"), "folder 'void' has no image"),
        (("--weights", weights, ""), "INPUT: cannot open '': it is empty"),
        (("--weights", weights, "*.gif"), "no image or video matches '*.gif'"),
        (("--weights", weights, "99"), "camera 99 cannot be opened"),
        (("--weights", weights, "pipe"), "'pipe' is a pipe or a device"),
        (("--weights", "no.pth", "photos/y.jpg"), "'no.pth' does not exist"),
        (("--weights", "notes.txt", "photos/y.jpg"), "text that begins with 'mine'"),
        (("photos/y.jpg", "--config-file", __file__), "--weights"),
        ((*good, "--classes", "circl"), "no class 'circl'; did you mean 'circle'?"),
        ((*good, "--set", "MODEL.DEVICE", "cpu"), "no effect: use --device"),
        (
            (*good, "--set", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9"),
            "no effect: use --score-threshold",
        ),
        ((*good, "--device", "cuda:77"), "--device is 'cuda:77'"),
        # Refused before the weights are read.
        (
            ("--weights", "notes.txt", "photos/y.jpg", "--device", "cpu", "--optimize", "fp16"),
            "--optimize fp16 is slower than fp32 on a CPU: use bf16",
        ),
        ((*good, "--score-threshold", "1.5"), "from 0 to 1, not '1.5'"),
        ((*good, "--batch-size", "0"), "at least 1, not '0'"),
        ((*good, "--no-pictures"), "leaves nothing to write"),
        ((*good, "--overlap", "0.1"), "--overlap needs --slice"),
        ((*good, "--classes", ", ,"), "--classes names no class"),
        ((*good, "--slice", "8"), "at least 32 pixels, got 8"),
        ((*good, "--slice", "64", "--overlap", "0.95"), "between 0 and 0.9, got 0.95"),
        ((*good, "--like", "notes.txt"), "--like needs --json"),
        ((*good, "--json", "--like", "gt.json"), "'gt.json' does not exist"),
        ((*good, "--set", "TEST.AUG.ENABLD", "True"), "did you mean 'TEST.AUG.ENABLED'"),
        ((*good, "--config-file", "no.yaml"), "'no.yaml' does not exist"),
        ((*good, "--output", "photos/y.jpg"), "cannot write into --output"),
        ((*good, "--output", "circle"), "cannot open 'circle'"),
        ((*good, "--output", "o" * 300), "File name too long"),
    ):
        assert words in refusal(capsys, *arguments), arguments


def test_a_wrong_path_is_answered_before_torch_is_imported(folder: Path) -> None:
    code = (
        "import sys; from mask_rcnn_tools.cli import main\n"
        "code = main(['predict', '--weights', 'photos/y.jpg', 'nowhere.jpg'])\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nowhere.jpg" in done.stderr
