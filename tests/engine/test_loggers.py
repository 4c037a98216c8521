"""SOLVER.LOGGERS: what the services receive, and that their errors never end a run."""

import json
import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.config.values import check_loggers
from mask_rcnn_plus.engine import loggers, main
from mask_rcnn_plus.engine.loggers import Loggers

# Both packages with the calls that the writers make; each call is a line of the list `calls`.
FAKE = """
from types import SimpleNamespace
calls, broken = [], set()
def record(name, result=None):
    def call(*args, **kwargs):
        if name in broken:
            raise ConnectionError(f"{name} failed")
        calls.append((name, args, kwargs))
        return result
    return call
run = SimpleNamespace(id="run1", info=SimpleNamespace(run_id="run1"), log=record("log"),
                      define_metric=record("define_metric"), finish=record("finish"))
init = record("start", run)
start_run = record("start", run)
Image = lambda path: path
log_params, log_metrics = record("log_params"), record("log_metrics")
log_artifact, end_run = record("log_artifact"), record("finish")
"""
NAMES = ("wandb", "mlflow")


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The fake packages."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield {name: __import__(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "my_run")
    Path(cfg.OUTPUT_DIR).mkdir()
    cfg.SOLVER.LOGGERS = list(NAMES)
    return cfg


def train(cfg: CfgNode, first: int = 0, last: int = 40) -> None:
    """What a training does with the writers."""
    with EventStorage(first) as storage:
        hook = Loggers(cfg)
        hook.trainer = SimpleNamespace(start_iter=first, max_iter=last, storage=storage)
        hook.before_train()
        for iteration in range(first, last):
            storage.iter = hook.trainer.iter = iteration
            storage.put_scalar("total_loss", 2.0)
            if iteration == 25:
                storage.put_scalar("segm/AP-cat (*)", 5.0, smoothing_hint=False)
            hook.after_step()
        hook.after_train()


def calls(service: Any, name: str) -> list[Any]:
    return [(args, kwargs) for called, args, kwargs in service.calls if called == name]


def test_both_services_receive_config_metrics_and_pictures(
    services: dict[str, Any], cfg: CfgNode
) -> None:
    (Path(cfg.OUTPUT_DIR) / "preview_mine_val.png").touch()
    train(cfg)
    wandb, mlflow = services["wandb"], services["mlflow"]
    ((_, start),) = calls(wandb, "start")
    assert start["name"] == "my_run" and start["config"]["SOLVER.BASE_LR"] == cfg.SOLVER.BASE_LR
    logged = [args[0] for args, _ in calls(wandb, "log")]
    assert logged[:3] == [
        {"iteration": 19, "total_loss": 2.0},
        {"iteration": 25, "segm/AP-cat (*)": 5.0},
        {"iteration": 39, "total_loss": 2.0},
    ]
    assert list(logged[3]) == ["preview_mine_val"]
    assert calls(wandb, "finish") == [((), {"exit_code": 0})]

    params: dict[str, str] = {}
    for (some,), _ in calls(mlflow, "log_params"):
        assert len(some) <= 100
        params |= some
    assert params["SOLVER.BASE_LR"] == str(cfg.SOLVER.BASE_LR)
    assert [(args[0], kwargs["step"]) for args, kwargs in calls(mlflow, "log_metrics")] == [
        ({"total_loss": 2.0}, 19),
        ({"segm/AP-cat ___": 5.0}, 25),
        ({"total_loss": 2.0}, 39),
    ]
    assert len(calls(mlflow, "log_artifact")) == 1
    assert calls(mlflow, "finish") == [(("FINISHED",), {})]


def test_a_resumed_run_continues_its_run_and_a_new_one_does_not(
    services: dict[str, Any], cfg: CfgNode
) -> None:
    train(cfg)
    train(cfg, first=20)
    train(cfg)
    starts = [kwargs for _, kwargs in calls(services["wandb"], "start")]
    assert [start["id"] for start in starts] == [None, "run1", None]
    starts = [kwargs for _, kwargs in calls(services["mlflow"], "start")]
    assert [start["run_id"] for start in starts] == [None, "run1", None]


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_an_error_of_a_service_is_one_warning(
    call: str, services: dict[str, Any], cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.SOLVER.LOGGERS = ["wandb"]
    services["wandb"].broken.add(call)
    with caplog.at_level(logging.WARNING, loggers.__name__):
        train(cfg)
    (record,) = caplog.records
    assert "wandb" in record.getMessage() and f"{call} failed" in record.getMessage()


def test_an_interrupted_run_does_not_count_as_finished(
    services: dict[str, Any], cfg: CfgNode
) -> None:
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            train(cfg)
    assert calls(services["wandb"], "finish") == [((), {"exit_code": 1})]
    assert calls(services["mlflow"], "finish") == [(("KILLED",), {})]


def test_names_are_checked_before_the_run(
    services: dict[str, Any], cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_loggers(cfg)
    for names, parts in [
        (["wandbd"], ["SOLVER.LOGGERS", "wandbd", "did you mean 'wandb'"]),
        (["tensorboard"], ["SOLVER.LOGGERS", "tensorboard", "wandb", "mlflow"]),
    ]:
        cfg.SOLVER.LOGGERS = names
        with pytest.raises(UserError) as error:
            check_loggers(cfg)
        assert all(part in str(error.value) for part in parts)
    # A folder of that name is not the package.
    cfg.SOLVER.LOGGERS = ["wandb"]
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"wandb.*not installed.*--extra wandb"):
        check_loggers(cfg)


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a file of an offline run: LevelDB's log format after a header of 7 bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:  # the end of a block is filled with zeros
            position += rest
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline_keeps_a_run(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tiny_config.parent / "output"
    command = ["--config-file", str(tiny_config)]
    options = ["SOLVER.LOGGERS", "['wandb']"]
    assert main([*command, *options]) == 0
    assert main([*command, "--resume", *options, "SOLVER.MAX_ITER", "3"]) == 0
    run_id = json.loads((output / "loggers.json").read_text())["wandb"]
    files = sorted(output.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2  # `wandb sync` joins them by the id
    rows, config = [], {}
    for data in (data for file in files for data in wandb_records(file)):
        record = wandb_internal_pb2.Record.FromString(data)
        if row := {"/".join(item.nested_key) or item.key: item for item in record.history.item}:
            rows.append({key: json.loads(item.value_json) for key, item in row.items()})
        config |= {item.key: item.value_json for item in record.run.config.update}
    assert [row["iteration"] for row in rows if "total_loss" in row] == [1, 2]
    assert any("segm/AP" in row for row in rows)
    assert any("preview_shapes_val/_type" in row for row in rows)
    assert json.loads(config["SOLVER.MAX_ITER"]) == 3


@pytest.mark.slow
def test_mlflow_offline_keeps_a_run(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    output = tiny_config.parent / "output"
    command = ["--config-file", str(tiny_config)]
    options = ["SOLVER.LOGGERS", "['mlflow']"]
    assert main([*command, *options]) == 0
    assert main([*command, "--resume", *options, "SOLVER.MAX_ITER", "3"]) == 0
    run_id = json.loads((output / "loggers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "output"
    assert run.data.params["SOLVER.MAX_ITER"] == "2"
    assert np.isfinite(run.data.metrics["total_loss"]) and "segm/AP" in run.data.metrics
    assert [m.step for m in client.get_metric_history(run_id, "total_loss")] == [1, 2]
    assert "preview_shapes_val.png" in [file.path for file in client.list_artifacts(run_id)]
