"""A fault ends a run in one line, with the finished iterations saved."""

import contextlib
import os
import random
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.data.mapper import SafeDatasetMapper
from mask_rcnn_plus.engine import Trainer, main, saving
from mask_rcnn_plus.engine.divergence import STRUCTURES, replay
from mask_rcnn_plus.engine.weights import non_finite, read_torch
from tests.engine.test_resume import differing, each_step, load

pytestmark = pytest.mark.slow

# How many SIGKILLs, at random moments of a run; set MRP_KILLS=50 for a longer test.
KILLS = int(os.environ.get("MRP_KILLS", "5"))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.strip().splitlines()
    # torch's own line on a machine with a CUDA toolkit but no GPU.
    lines = [line for line in lines if "No CUDA runtime" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), "\n".join(lines)
    return lines[0]


def test_a_run_killed_at_random_moments_loses_nothing(small_config: Path, tmp_path: Path) -> None:
    def command(name: str, *arguments: str) -> list[str]:
        keys = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.KEEP_CHECKPOINTS", "3"]
        keys += ["SOLVER.MAX_ITER", "12", "OUTPUT_DIR", str(tmp_path / name)]
        return ["--config-file", str(small_config), *arguments, *keys]

    assert main(command("whole")) == 0
    final = tmp_path / "whole" / "model_final.pth"
    draw = random.Random(0)
    kills = attempts = reached = 0
    name = ""
    while kills < KILLS:
        if not name:
            name = f"cut{attempts}"
            attempts += 1
        run = get_context("fork").Process(target=_run_silently, args=(command(name, "--resume"),))
        run.start()
        # Wait for the run's first save, so that most kills hit its steps and saves.
        begun = time.monotonic()
        last = _last(tmp_path / name)
        while run.is_alive() and _last(tmp_path / name) == last and time.monotonic() < begun + 60:
            time.sleep(0.001)
        run.join(draw.uniform(0, 0.3))
        if run.is_alive():
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
            run.join()
            reached = max(reached, _last(tmp_path / name))
        else:
            assert run.exitcode == 0
            assert differing(final, tmp_path / name / "model_final.pth") == []
            name = ""
    if name:
        assert main(command(name, "--resume")) == 0
        assert differing(final, tmp_path / name / "model_final.pth") == []
    assert reached > 0
    print(f"{kills} kills over {attempts} runs")


def _run_silently(command: list[str]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(main(command))


def _last(folder: Path) -> int:
    """The iteration of a run's newest periodic checkpoint; -1 for none."""
    numbers = [int(path.stem[6:]) for path in folder.glob("model_0*.pth")]
    return max(numbers, default=-1)


def test_a_full_disk_ends_in_one_line(
    small_config: Path, tmp_path: Path, tmpfs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path, *arguments: str) -> int:
        command = ["--config-file", str(small_config), *arguments, "OUTPUT_DIR", str(folder)]
        return main([*command, "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "12"])

    assert run(tmpfs) == 4
    message = error_of(capsys)
    last = tmpfs / (tmpfs / "last_checkpoint").read_text()
    assert "No space left on device" in message and f"{last.name}, is intact" in message
    assert saving.damage(last) == "" and not list(tmpfs.glob("*.part"))
    shutil.copytree(tmpfs, tmp_path / "larger")
    assert run(tmp_path / "larger", "--resume") == run(tmp_path / "whole") == 0
    assert differing(*[tmp_path / n / "model_final.pth" for n in ("larger", "whole")]) == []


def test_a_full_disk_keeps_the_last_whole_files(
    small_config: Path, tmp_path: Path, tmpfs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config-file", str(small_config), "SOLVER.MAX_ITER", "1"]) == 0
    weights = tmp_path / "output" / "model_final.pth"
    folder = tmpfs / "inference" / "shapes_val"
    folder.mkdir(parents=True)
    old = [tmpfs / "config.yaml", tmpfs / "preview_shapes_val.png"]
    old += [folder / n for n in ("metrics.json", "summary.csv", "coco_instances_results.json")]
    for path in old:
        path.write_text("old")
    command = ["--config-file", str(small_config), "--eval-only", "OUTPUT_DIR", str(tmpfs)]
    command += ["MODEL.WEIGHTS", str(weights), "DATASETS.TEST", "('shapes_val',)"]
    command += ["TEST.PREVIEW_IMAGES", "1"]
    capsys.readouterr()
    with (tmpfs / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
        while True:
            fill.write(b"0" * 4096)
    for free in (0, 12_000):  # the second is enough for config.yaml, but not for all results
        os.truncate(tmpfs / "fill", (tmpfs / "fill").stat().st_size - free)
        assert main(command) == 4
        assert "No space left" in error_of(capsys)
        whole = [path for path in old if path.read_text(errors="replace") == "old"]
        assert len(whole) >= (5 if not free else 2)
        assert not list(tmpfs.rglob("*.part"))


def test_a_folder_that_vanishes_ends_in_one_line(
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone, moved = tmp_path / "output", tmp_path / "moved"
    each_step(monkeypatch, lambda now: gone.rename(moved) if now == 2 else None)
    assert main(["--config-file", str(small_config)]) == 4
    assert "output/model_0000003.pth': No such file or directory" in error_of(capsys)
    assert not list(gone.glob("*.pth*"))
    assert saving.damage(moved / "model_0000001.pth") == ""


def test_a_corrupt_image_is_skipped_within_the_budget(
    small_config: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shapes_root / "shapes", tmp_path / "shapes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    victims = sorted((tmp_path / "shapes" / "images").glob("train_*.png"))[:2]

    def spoil(now: int) -> None:
        if now == 1:
            victims[0].unlink()
            victims[1].write_bytes(victims[1].read_bytes()[:200])

    config = ["--config-file", str(small_config)]
    with monkeypatch.context() as patch:
        each_step(patch, spoil)
        # Two images are left; a batch with the same image twice is too little for BatchNorm.
        keys = ["DATALOADER.MAX_BAD_SAMPLES", "2", "SOLVER.BASE_LR", "1e-6"]
        keys += ["MODEL.RESNETS.NORM", "FrozenBN"]
        assert main([*config, *keys]) == 0
    screen = capsys.readouterr().out
    assert "2 images were skipped" in screen
    for victim in victims:
        # Once when the image is skipped, and once at the end.
        assert screen.count(f"image '{victim}' ") == 2
    data = load(tmp_path / "output" / "model_final.pth")["trainer"]["data"]
    assert set(data["bad"]) == {str(victim) for victim in victims}


@pytest.mark.parametrize("fault", ["dead", "hanging", "refused"])
def test_a_loader_that_fails_leaves_a_saved_run(
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    call = SafeDatasetMapper.__call__
    begun = tmp_path / "begun"
    counter = iter(range(1000))

    def failing(self: SafeDatasetMapper, record: dict[str, Any]) -> Any:
        # In the only worker; two images per iteration.
        if next(counter) == 8:
            if fault == "dead":
                while not begun.exists():  # until there is something to save
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "hanging":
                time.sleep(60)
            raise OSError("truncated")
        return call(self, record)

    command = ["--config-file", str(small_config), "SOLVER.CHECKPOINT_PERIOD", "100"]
    timeout = ["DATALOADER.NUM_WORKERS", "1", "DATALOADER.TIMEOUT", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(SafeDatasetMapper, "__call__", failing)
        each_step(patch, lambda now: begun.touch() if now == 2 else None)
        assert main([*command, *timeout]) == {"refused": 2}.get(fault, 5)
    message = error_of(capsys)
    expected = {"dead": "worker died", "hanging": "no batch for 2 seconds", "refused": "truncated"}
    assert expected[fault] in message and "train_" in message
    last = (tmp_path / "output" / "last_checkpoint").read_text()
    assert last in (["model_0000002.pth"] * (fault == "dead") + ["model_0000003.pth"])
    if fault == "dead":
        assert main([*command[:2], "--resume", *command[2:]]) == 0
        assert main([*command, "OUTPUT_DIR", str(tmp_path / "whole")]) == 0
        assert differing(*[tmp_path / n / "model_final.pth" for n in ("output", "whole")]) == []


def test_a_divergence_is_explained_and_can_be_replayed(
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainers = []
    build = Trainer.build_hooks
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: trainers.append(self) or build(self))

    def poison(now: int) -> None:
        if now == 3:
            with torch.no_grad():
                trainers[0].model.roi_heads.mask_head.deconv.bias[0] = torch.inf

    with monkeypatch.context() as patch:
        each_step(patch, poison)
        assert main(["--config-file", str(small_config)]) == 3
    message = error_of(capsys)
    assert "diverged at iteration 4" in message and "mask_head.deconv.bias" in message
    assert "try SOLVER.BASE_LR 0.001" in message and "train_" in message
    # Only finite weights were saved.
    last = tmp_path / "output" / "last_checkpoint"
    assert last.read_text() == "model_0000003.pth"
    assert not list(non_finite(load(last.with_name("model_0000003.pth"))["model"]))

    stored = read_torch(tmp_path / "output" / "divergence.pt", also=STRUCTURES)
    assert stored["iteration"] == 4 and f"'{stored['batch'][0]['file_name']}'" in message
    cfg = load_config(tmp_path / "output" / "config.yaml")
    tensor, losses = replay(tmp_path / "output" / "divergence.pt", Trainer.build_model(cfg))
    assert tensor == stored["first_bad"]
    assert not torch.tensor(losses["loss_mask"]).isfinite() and losses["loss_cls"] < 100

    hostile = tmp_path / "hostile.pt"
    torch.save({"batch": Path("x")}, hostile)
    with pytest.raises(UserError, match="may run code"):
        replay(hostile, torch.nn.Identity())


def test_a_learning_rate_that_is_too_large_is_not_saved(
    small_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-file", str(small_config), "SOLVER.BASE_LR", "1e6"]
    assert main([*command, "SOLVER.CHECKPOINT_PERIOD", "1"]) == 3
    message = error_of(capsys)
    assert "first tensor that is not finite: " in message
    assert "try SOLVER.BASE_LR 1e+05" in message
    for path in (tmp_path / "output").glob("*.pth"):
        assert not list(non_finite(load(path)["model"]))
