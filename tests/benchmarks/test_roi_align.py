"""python -m benchmarks.roi_align on small inputs: its output and its refusals."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import roi_align
from benchmarks.roi_align import input_sets, make_boxes, make_poolers, make_pyramid, touched_cells
from mask_rcnn_tools.arguments import run_command

main = partial(run_command, roi_align.main)


SMALL = ("--channels", "2", "--repeats", "1", "--rois", "100", "--threads", "1")
ROOT = Path(__file__).parents[2]


def table(text: str) -> list[dict[str, str]]:
    """The rows of the Markdown table in a text: column -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---"}
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Markdown and json of one small run."""
    folder = tmp_path_factory.mktemp("benchmark") / "new" / "folder"
    arguments = [*SMALL, "--sampling", "2", "--output", str(folder)]
    # The second run replaces the files of the first.
    assert main([*arguments, "--dtypes", "fp32"]) == 0
    assert main([*arguments, "--overwrite"]) == 0
    return (folder / "roi_align.md").read_text(), json.loads(
        (folder / "roi_align.json").read_text()
    )


def test_every_combination_has_a_row(result: tuple[str, dict]) -> None:
    rows = result[1]["rows"]
    assert [(r["dtype"], r["layout"], r["direction"]) for r in rows] == [
        (dtype, layout, direction)
        for dtype in ("fp32", "fp16", "bf16")
        for layout in ("NCHW", "channels_last")
        for direction in ("forward", "backward")
    ]
    assert {(r["rois"], r["bins"], r["sampling_ratio"]) for r in rows} == {(100, 14, 2)}


def test_all_implementations_agree_with_fp64(result: tuple[str, dict]) -> None:
    for row in result[1]["rows"]:
        if row["dtype"] == "fp32":
            assert set(row["error"]) == {"ours", "detectron2", "torchvision"}
            assert all(error < 1e-4 for error in row["error"].values())
        else:
            assert row["error"]["ours"] < {"fp16": 2e-3, "bf16": 1e-2}[row["dtype"]]
        assert row["error"]["ours"] > 0


def test_ratios_follow_from_the_times(result: tuple[str, dict]) -> None:
    for row in result[1]["rows"]:
        times = row["milliseconds"]
        # torchvision's operator does not support bf16; the fp32 baseline is always there.
        missing = {"detectron2", "torchvision"} if row["dtype"] == "bf16" else set()
        every = {"ours", "detectron2", "torchvision", "detectron2 NCHW fp32"}
        assert set(times) == every - missing
        for name, ratio in row["speedup"].items():
            assert ratio == pytest.approx(times[name] / times["ours"])
        assert row["floor"] > 0 and all(time > 0 for time in times.values())
        if (row["dtype"], row["layout"]) == ("fp32", "NCHW"):
            assert times["detectron2"] == times["detectron2 NCHW fp32"]


def test_markdown_and_json_contain_the_same_values(result: tuple[str, dict]) -> None:
    markdown, report = result
    rows = table(markdown)
    assert len(rows) == len(report["rows"])
    for shown, row in zip(rows, report["rows"], strict=True):
        assert shown["case"] == "100 x 14x14"
        assert shown["ours ms"] == f"{row['milliseconds']['ours']:.2f}"
        assert shown["detectron2 ms"] == (
            "-" if row["dtype"] == "bf16" else f"{row['milliseconds']['detectron2']:.2f}"
        )
        ratio = row["speedup"]["detectron2 NCHW fp32"]
        assert shown["against detectron2 NCHW fp32"] == f"{ratio:.2f}x"
        assert float(shown["error ours"]) == pytest.approx(row["error"]["ours"], rel=0.06)
        assert "extra MiB ours" not in shown  # only CUDA counts memory


def test_a_report_names_command_versions_and_machine(result: tuple[str, dict]) -> None:
    markdown, report = result
    assert report["command"].startswith("python -m benchmarks.roi_align --channels 2 ")
    assert report["command"].endswith(" --overwrite")
    assert (report["channels"], report["repeats"]) == (2, 1)
    environment = report["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert environment["detectron2"].endswith(")")
    assert {"CPU", "torchvision", "mask_rcnn_plus", "Python", "operators"} <= set(environment)
    assert report["command"] in markdown
    assert f"torch {torch.__version__}" in markdown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--repeats", "0"], "--repeats: must be a whole number of at least 1, not '0'"),
        (["--channels", "-1"], "--channels: must be a whole number of at least 1, not '-1'"),
        (["--threads", "two"], "--threads: must be a whole number of at least 1, not 'two'"),
        (["--dtypes", "fp8"], "fp8"),
        (["--rois", "7"], "--rois"),
        (["--device", "tpu"], "tpu"),
        (["--channel", "4"], "--channel"),
        (["--channels", str(10**12)], "too little memory"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert expected in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Root may write into any folder, but not into a file.
        ("file/below", "cannot write into"),
        ("file", "cannot write into"),
        ("finished", "roi_align.json exists; name another --output, or give --overwrite"),
        ("odd", "roi_align.md is a folder"),
    ],
)
def test_unwritable_output_is_refused_before_the_run(
    name: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> None:
        raise AssertionError("the run started")

    monkeypatch.setattr("benchmarks.roi_align._run", run)
    (tmp_path / "file").touch()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "roi_align.json").write_text("an hour's work")
    (tmp_path / "odd" / "roi_align.md").mkdir(parents=True)
    assert main(["--output", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert expected in message
    assert (tmp_path / "finished" / "roi_align.json").read_text() == "an hour's work"


@pytest.mark.slow
def test_the_script_prints_its_table(tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.roi_align",
            *SMALL,
            "--dtypes",
            "fp32",
            "--sampling",
            "0",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Standard error is empty, since a progress bar needs a terminal.
    assert (process.returncode, process.stderr) == (0, "")
    rows = table(process.stdout)
    assert [row["sampling"] for row in rows] == ["adaptive"] * 4
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_counted_on_a_gpu(tmp_path: Path) -> None:
    arguments = ("--device", "cuda", "--sampling", "2", "--output", str(tmp_path))
    assert main([*SMALL, *arguments]) == 0
    report = json.loads((tmp_path / "roi_align.json").read_text())
    assert report["environment"]["GPU"] == torch.cuda.get_device_name()
    output_mib = 100 * 2 * 14 * 14 * 4 / 2**20
    for row in report["rows"]:
        if (row["dtype"], row["direction"]) == ("fp32", "forward"):
            assert all(value >= output_mib for value in row["extra_mib"].values())


@pytest.mark.parametrize("ratio", [0, 2])
def test_the_three_poolers_agree_on_every_level(ratio: int) -> None:
    maps, boxes = make_pyramid(3, 0, "cpu"), make_boxes(60, 0, "cpu")
    poolers = make_poolers(7, ratio)
    expected = poolers.pop("detectron2")(maps, [boxes])
    assert expected.shape == (60, 3, 7, 7)
    for pool in poolers.values():
        torch.testing.assert_close(pool(maps, [boxes]), expected, rtol=0, atol=1e-4)


def test_maps_have_the_size_of_a_padded_image() -> None:
    shapes = [tuple(m.shape) for m in make_pyramid(5, 0, "cpu")]
    assert shapes == [(1, 5, 200, 336), (1, 5, 100, 168), (1, 5, 50, 84), (1, 5, 25, 42)]


def test_boxes_have_the_documented_distribution() -> None:
    boxes = make_boxes(20000, 3, "cpu").tensor.double()
    width, height = (boxes[:, 2] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 1])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 1333 and boxes[:, 3].max() <= 800
    size, aspect = (width * height).sqrt(), width / height
    assert size.min() >= 15.99 and size.max() < 801
    # Log-uniform: the first tenth of the logarithmic range contains a tenth of the boxes.
    for share in (0.1, 0.5, 0.8):
        assert (size < 16 * 50**share).double().mean() == pytest.approx(share, abs=0.015)
    whole = size < 400  # larger boxes may be cut to the image
    assert aspect[whole].min() >= 0.499 and aspect[whole].max() <= 2.001
    for share in (0.25, 0.5, 0.9):
        found = (aspect[whole] < 2 ** (2 * share - 1)).double().mean()
        assert found == pytest.approx(share, abs=0.015)


def test_touched_cells_by_hand() -> None:
    def count(x0: float, y0: float, x1: float, y1: float) -> int:
        boxes = make_boxes(1, 0, "cpu")
        boxes.tensor[:] = torch.tensor([x0, y0, x1, y1])
        return touched_cells(boxes, 1, 1)

    # One sample at the box's center: on the center of a cell, between two cells, between four.
    assert count(40, 40, 44, 44) == 1
    assert count(42, 40, 46, 44) == 2
    assert count(42, 42, 46, 46) == 4


@pytest.mark.parametrize("implementations", [1, 2, 3, 4])
def test_implementations_alternate_and_use_every_input_set(implementations: int) -> None:
    count, seen = input_sets(implementations), []
    runs = {
        f"implementation {i}": [lambda i=i, j=j: seen.append((i, j)) for j in range(count)]
        for i in range(implementations)
    }
    times = roi_align.median_times(runs, 11, "cpu")  # three timings per turn, and a turn to warm up
    assert set(times) == set(runs) and all(math.isfinite(value) for value in times.values())
    assert [i for i, _ in seen] == [i for i in range(implementations) for _ in range(3)] * 12
    assert len(set(seen)) == implementations * count
    # A set is used again only after all the others.
    assert all(len({j for _, j in seen[k : k + count]}) == count for k in range(len(seen) - count))


@pytest.mark.parametrize(("patience", "turns"), [(1000.0, 6), (-1.0, 4)])
def test_slow_implementations_are_timed_less_often(
    patience: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roi_align, "PATIENCE_SECONDS", patience)
    calls = []
    roi_align.median_times({"ours": [lambda: calls.append(0)]}, 5, "cpu")
    assert len(calls) == 3 * turns  # including one warm-up turn
