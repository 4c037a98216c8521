"""mask-rcnn-plus predict: inputs, outputs, errors and exit codes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mask_rcnn_tools.cli import main
from mask_rcnn_tools.predict import inputs
from mask_rcnn_tools.predict import run as predict_run
from mask_rcnn_tools.predict.inputs import find_sources


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
    assert cv2.imread("output/predictions/y.jpg").shape == (64, 80, 3)


def test_all_outputs_agree(folder: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos" / "z.jpg").write_text("not an image")
    given = ["photos/a/x.png", "photos/b/x.png", "photos", "photos/*.jpg"]
    assert run(weights, *given, "--output", "out", "--json", "--csv", "--cutouts") == 1
    captured = capsys.readouterr()
    assert "skipped: photos/z.jpg is not an image" in captured.err and "1 skipped" in captured.out

    # Each file once; the second x.png gets another name.
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
    common = ["--weights", weights, "--output", "other"]
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
    monkeypatch.setattr(inputs, "_announced_frames", lambda _: 10)
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
        sources = find_sources(inputs, recursive=recursive, output=Path("photos/out"))
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["predictions.json", "images.json", "objects.csv"])
def test_a_full_disk_gives_a_one_line_error(
    name: str, folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / name).symlink_to("/dev/full")
    outputs = ("--output", "out", "--overwrite", "--json", "--csv", "--no-pictures")
    assert run(weights, "photos/y.jpg", *outputs) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: cannot write into --output out: No space left on device"


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
    for arguments, words in (
        (("--weights", weights, "phots"), "'phots' does not exist; did you mean 'ph"),
        (("--weights", weights, "void"), "folder 'void' has no image"),
        (("--weights", weights, ""), "INPUT: cannot open '': it is empty"),
        (("--weights", weights, "*.gif"), "no image or video matches '*.gif'"),
        (("--weights", weights, "99"), "camera 99 cannot be opened"),
        (("--weights", "no.pth", "photos/y.jpg"), "'no.pth' does not exist"),
        (("--weights", "notes.txt", "photos/y.jpg"), "text that begins with 'mine'"),
        (("photos/y.jpg",), "--weights"),
        ((*good, "--classes", "circl"), "no class 'circl'; did you mean 'circle'?"),
        ((*good, "--classes", " ,"), "--classes names no class"),
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
        ((*good, "--slice", "8"), "at least 32 pixels, got 8"),
        ((*good, "--like", "notes.txt"), "--like needs --json"),
        ((*good, "--json", "--like", "gt.json"), "'gt.json' does not exist"),
        ((*good, "--set", "TEST.AUG.ENABLD", "True"), "did you mean 'TEST.AUG.ENABLED'"),
        ((*good, "--config-file", "no.yaml"), "'no.yaml' does not exist"),
        ((*good, "--output", "photos/y.jpg"), "cannot write into --output"),
    ):
        assert words in refusal(capsys, *arguments), arguments
