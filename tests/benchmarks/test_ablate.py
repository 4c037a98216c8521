"""python -m benchmarks.ablate: its arithmetic, and which runs it repeats."""

import csv
import hashlib
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml

from benchmarks import ablate
from benchmarks.ablation_runs import Family, Processes, Run, find_families, known_families
from benchmarks.ablation_table import Spread, differences, markdown, to_csv
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import run_command

main = partial(run_command, ablate.main)


def finished(row: str, seed: int, ap: float) -> Run:
    record = {"state": "finished", "results": {"mask AP": ap}, "train_seconds": 60.0}
    return Run(row, seed, "", "val", Path(f"{row}/seed_{seed}"), {**record, "cpu_seconds": 90.0})


FAMILY = Family(
    name="pooling",
    folder=Path("pooling"),
    rows=("pool", "align"),
    baseline="pool",
    title="Pooling",
    paper="a table",
    paper_rows={"pool": {"mask AP": 26.9}, "align": {"mask AP": 30.3}},
)
# By seed: 10, 12, 14 and 13, 14, 18; the differences are 3, 2, 4.
RUNS = [finished("pool", s, ap) for s, ap in ((1, 10.0), (2, 12.0), (3, 14.0))]
RUNS += [finished("align", s, ap) for s, ap in ((1, 13.0), (2, 14.0), (3, 18.0))]


def test_mean_and_sample_standard_deviation() -> None:
    # The squared differences from 12 are 4, 0 and 4; their sum over n - 1 is 4.
    assert Spread.of([10.0, 12.0, 14.0]) == Spread(3, 12.0, 2.0)
    assert Spread.of([10.0]).text() == "10.0"
    assert Spread.of([]).text() == "-"


def test_differences_compare_runs_with_the_same_seed() -> None:
    assert differences(RUNS, "align", "pool", "mask AP") == {1: 3.0, 2: 2.0, 3: 4.0}
    # A seed that the baseline lacks is skipped.
    assert differences(RUNS[1:], "align", "pool", "mask AP") == {2: 2.0, 3: 4.0}


def test_tables_contain_rows_differences_and_the_papers_values() -> None:
    text = markdown(FAMILY, RUNS, ["`command`"])
    lines = text.splitlines()
    assert "| pool | 3 | 12.0 ± 2.0 | 60 ± 0 | 90 ± 0 | 26.9 |" in lines
    assert "| align | 3 | 15.0 ± 2.6 | 60 ± 0 | 90 ± 0 | 30.3 |" in lines
    assert "| align | 3 | +3.0 ± 1.0 | +3.4 |" in lines
    rows = list(csv.DictReader(io.StringIO(to_csv(FAMILY, RUNS))))
    (align,) = [r for r in rows if r["row"] == "align" and r["metric"] == "mask AP"]
    assert (align["mean"], align["difference"], align["difference_sd"]) == (
        "15.0000",
        "3.0000",
        "1.0000",
    )
    assert align["values"] == "1=13.0000 2=14.0000 3=18.0000"


def test_failed_and_unfinished_runs_are_listed() -> None:
    failed = Run("align", 1, "", "val", Path("x"), {"state": "failed", "error": "exit code 1: no"})
    text = markdown(FAMILY, [RUNS[0], failed, Run("align", 2, "", "val", Path("y"))], [])
    assert "- align seed 1: exit code 1: no" in text
    assert "1 of 3 runs are not finished." in text


def test_the_families_of_the_repository_are_complete() -> None:
    assert known_families() == [
        "2b_mask_loss",
        "2c_pooling",
        "2d_stride_32",
        "2e_mask_branch",
        "3_joint_training",
        "frozen",
        "rare_class",
        "training",
    ]
    # "all" skips the families that are not in the paper.
    assert sum(len(family.rows) for family in find_families("all")) == 15
    (training,) = find_families("training")
    assert set(training.rows) == {
        *("baseline", "ema", "constant_rate", "constant_rate_ema"),
        *("jitter", "copy_paste", "color", "lighting", "blur", "focal"),
        *("amp_bf16", "batch_8", "batch_8_scaled"),
        *("sgd", "sgd_batch_8", "sgd_batch_8_scaled"),
    }


def test_results_of_averaged_weights_replace_the_others(tmp_path: Path) -> None:
    for folder, value in (("ema", 30.0), (".", 20.0)):
        inference = tmp_path / folder / "inference" / "val"
        inference.mkdir(parents=True)
        (inference / "metrics.json").write_text(json.dumps({"segm": {"AP": value}}))
    (tmp_path / "metrics.json").touch()
    run = Run("ema", 1, "SOLVER: {MAX_ITER: 2}", "val", tmp_path)
    Processes(1, keep_weights=True)._conclude(run, 0, 1.0)
    assert run.results == {"mask AP": 30.0}


def test_training_seconds_count_the_iterations_that_ran(tmp_path: Path) -> None:
    inference = tmp_path / "inference" / "val"
    inference.mkdir(parents=True)
    (inference / "metrics.json").write_text(json.dumps({"segm": {"AP": 20.0}}))
    # 40 of 100 iterations, mostly of 0.5 s, and a line of the evaluation.
    lines = [{"iteration": i, "time": t} for i, t in ((9, 0.5), (19, 9.0), (29, 0.4), (39, 0.5))]
    lines.append({"iteration": 40, "segm/AP": 20.0})
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    run = Run("row", 1, "SOLVER: {MAX_ITER: 100}", "val", tmp_path)
    Processes(1, keep_weights=True)._conclude(run, 0, 1.0)
    assert run.record["train_seconds"] == 20.0


@pytest.fixture
def folder(tiny_config: Path) -> Path:
    """A family of two rows on the tiny shapes; a second family has one of the configs too."""
    base = yaml.safe_load(tiny_config.read_text())
    for name in ("mine/a", "mine/b", "other/same_as_b"):
        path = tiny_config.parent / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        lr = 0.001 if name.endswith("a") else 0.002
        solver = {**base["SOLVER"], "BASE_LR": lr}
        path.write_text(yaml.safe_dump({**base, "SOLVER": solver}))
    return tiny_config.parent / "mine"


def command(folder: Path, *more: str) -> list[str]:
    output = str(folder.parent / "out")
    return [str(folder), "--seeds", "1", "--output", output, *more]


class FakeProcesses(Processes):
    """Writes a result instead of training, and collects the folders of the runs."""

    ran: list[Path]
    failing = ""

    def train(self, run: Run) -> None:
        self.ran.append(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "ablation.yaml").write_text(run.config)
        if run.row == self.failing:
            self._save_record(run, state="failed", error="it broke", cpu_seconds=1.0)
        else:
            results = {"box AP": 20.0, "mask AP": 10.0}
            self._save_record(run, state="finished", results=results, cpu_seconds=1.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcesses]:
    monkeypatch.setattr(ablate, "Processes", FakeProcesses)
    monkeypatch.setattr(FakeProcesses, "ran", [], raising=False)
    monkeypatch.setattr(FakeProcesses, "failing", "")
    return FakeProcesses


def names(paths: list[Path]) -> list[str]:
    return ["/".join(path.parts[-3:]) for path in paths]


def test_finished_runs_are_not_repeated(folder: Path, fake: type[FakeProcesses]) -> None:
    assert main(command(folder)) == 0
    assert names(fake.ran) == ["mine/a/seed_1", "mine/b/seed_1"]
    record = folder.parent / "out" / "shapes_val" / "mine" / "b" / "seed_1" / "run.json"
    # Such a record remains after a killed process.
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running"}))
    fake.ran.clear()
    assert main(command(folder)) == 0
    assert names(fake.ran) == ["mine/b/seed_1"]
    # Equal configs share one run, even in different families.
    fake.ran.clear()
    assert main(command(folder.parent / "other")) == 0
    assert fake.ran == []
    table = folder.parent / "out" / "shapes_val" / "other" / "table.md"
    assert "| same_as_b | 1 | 20.0 | 10.0 |" in table.read_text()


def test_new_config_keys_do_not_invalidate_finished_runs(
    folder: Path, fake: type[FakeProcesses], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder)) == 0
    # Such files come from a version without the key.
    seed = folder.parent / "out" / "shapes_val" / "mine" / "a" / "seed_1"
    config = yaml.safe_load((seed / "ablation.yaml").read_text())
    del config["SOLVER"]["ACCUMULATE_STEPS"]
    text = yaml.safe_dump(config)
    (seed / "ablation.yaml").write_text(text)
    record = json.loads((seed / "run.json").read_text())
    record["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (seed / "run.json").write_text(json.dumps(record))
    fake.ran.clear()
    assert main(command(folder)) == 0
    assert fake.ran == []
    assert main(command(folder, "SOLVER.ACCUMULATE_STEPS", "2")) == 2
    assert "SOLVER.ACCUMULATE_STEPS was 1, is now 2" in capsys.readouterr().err


def test_another_config_in_the_same_folder_is_refused(
    folder: Path, fake: type[FakeProcesses], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder)) == 0
    fake.ran.clear()
    assert main(command(folder, "SOLVER.MAX_ITER", "3")) == 2
    assert "SOLVER.MAX_ITER was 2, is now 3" in capsys.readouterr().err
    assert fake.ran == []
    assert main(command(folder, "--overwrite", "SOLVER.MAX_ITER", "3")) == 0
    assert len(fake.ran) == 2


@pytest.mark.parametrize(
    ("file", "text", "again"),
    [
        ("run.json", '{"state": "finished", "results": null}', True),
        ("run.json", '{"state": "finished", "results": {"mask AP": "x"}}', True),
        ("run.json", '{"state": "finished", "results": {}, "cpu_seconds": "x"}', True),
        ("run.json", "[" * 10**5, True),
        ("ablation.yaml", "- 1\n", False),
        ("ablation.yaml", "1: {2: 3}\n", False),
        ("ablation.yaml", "MODEL: 2001-01-01\n", False),
        ("ablation.yaml", "a: " + "[" * 3000, False),
    ],
)
@pytest.mark.slow
def test_damaged_files_of_a_run_cause_no_traceback(
    folder: Path,
    fake: type[FakeProcesses],
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str,
    again: bool,
) -> None:
    assert main(command(folder)) == 0
    fake.ran.clear()
    (folder.parent / "out" / "shapes_val" / "mine" / "a" / "seed_1" / file).write_text(text)
    assert main(command(folder)) == (0 if again else 2)
    assert names(fake.ran) == (["mine/a/seed_1"] if again else [])
    if not again:
        assert "mine/a/seed_1 contains a run of another config" in capsys.readouterr().err


def test_a_failed_run_does_not_stop_the_others(
    folder: Path, fake: type[FakeProcesses], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = "a"
    assert main(command(folder)) == 1
    err = capsys.readouterr().err
    assert "mine/a/seed_1: it broke" in err
    table = (folder.parent / "out" / "shapes_val" / "mine" / "table.md").read_text()
    assert "| b | 1 | 20.0 | 10.0 |" in table and "- a seed 1: it broke" in table


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["2c_poling"], "unknown ablation '2c_poling'; did you mean '2c_pooling'?"),
        (["2c_pooling", "--seeds", "0"], "--seeds"),
        (["MINE", "--data", "nothing_train:nothing_val"], "'nothing_train' is not registered"),
        (["MINE", "SOLVER.MAX_ITR", "3"], "did you mean 'SOLVER.MAX_ITER'?"),
        (["MINE", "--output", "/proc/none"], "cannot write into --output"),
        (["EMPTY"], "has no configs"),
        ([], "name an ablation"),
    ],
)
def test_mistakes_end_in_one_line_before_any_run(
    arguments: list[str],
    expected: str,
    folder: Path,
    fake: type[FakeProcesses],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder.parent / "empty").mkdir()
    paths = {"MINE": str(folder), "EMPTY": str(folder.parent / "empty")}
    arguments = [paths.get(argument, argument) for argument in arguments]
    assert main(["--output", str(folder.parent / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert fake.ran == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"classes": "circle"}', "classes: expected a list of names, got 'circle'"),
        ('{"order": 5}', "order: expected a list of names, got 5"),
        ('{"rows": ["a"]}', 'rows: expected numbers as in {"ROW": {"mask AP": 30.3}}, got ["a"]'),
        ('{"rows": {"a": {"mask AP": "x"}}}', "rows: expected numbers"),
        ("[" * 10**5, "invalid JSON"),
    ],
)
def test_invalid_descriptions_of_a_family_are_refused(
    folder: Path, text: str, expected: str
) -> None:
    (folder / "family.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(expected)):
        find_families(str(folder))


@pytest.mark.slow
def test_a_tiny_ablation_from_end_to_end(folder: Path) -> None:
    (folder / "family.json").write_text('{"classes": ["circle", "hexagon"]}')
    (folder / "b.yaml").write_text((folder / "a.yaml").read_text())  # so both rows share one run
    batch = yaml.safe_load((folder / "a.yaml").read_text())["SOLVER"]["IMS_PER_BATCH"]
    other = yaml.safe_dump({"_BASE_": "a.yaml", "SOLVER": {"IMS_PER_BATCH": batch + 1}})
    (folder / "c.yaml").write_text(other)
    assert main(command(folder)) == 0
    out = folder.parent / "out" / "shapes_val" / "mine"
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "a" / "seed_1" / "run.json").read_text())
    assert record["state"] == "finished" and record["cpu_seconds"] > 0
    assert {"box AP", "mask AP"} <= set(record["results"])
    assert not list((out / "a" / "seed_1").glob("*.pth")) and not (out / "b").exists()
    table = (out / "table.md").read_text()
    assert "| b | 1 | +0.0 " in table
    assert f"baseline: 2 iterations of {batch} images" in table  # not the last row's
    assert "box AP-circle | mask AP-circle | training s" in table and "hexagon" not in table
