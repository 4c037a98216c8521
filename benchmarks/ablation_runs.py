"""Families of an ablation, the training runs of their rows, and the processes behind the runs."""

import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

import mask_rcnn_plus
from mask_rcnn_plus.config import get_cfg
from mask_rcnn_plus.errors import UserError, did_you_mean, reason

DESCRIPTION = "family.json"
RECORD, CONFIG, LOG = "run.json", "ablation.yaml", "output.txt"
_METRICS = ("AP", "AP50", "AP75")
METRICS = tuple(f"{task} {name}" for task in ("box", "mask") for name in _METRICS)

_CONFIGS = Path(__file__).parents[1] / "configs" / "ablations"
_KEYS = {"title", "baseline", "order", "paper", "rows", "only_by_name", "classes"}
# Otherwise glibc returns blocks of some megabytes to the system after each use and requests them
# again, which costs a seventh of a run's CPU time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
# Threads that spin while they wait slow down other processes on their core.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# Errors of a damaged config: yacs does not check what YAML returns.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, AssertionError, RecursionError),
    yaml.YAMLError,
)
_TRAIN = "import sys; from mask_rcnn_plus.engine import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Family:
    """A folder of configs that differ in one choice: the rows of a table.

    Attributes:
        name: the folder's name.
        folder: contains the configs.
        rows: names of the config files without their suffix, in the table's order.
        baseline: the row that the others are compared with.
        title: the table's title.
        paper: the source of the paper's values, or "".
        paper_rows: row -> metric, e.g. "mask AP" -> the paper's value in percent.
        only_by_name: "all" skips this family: it is not a table of the paper, or needs other data.
        classes: the classes whose own AP the table shows.
    """

    name: str
    folder: Path
    rows: tuple[str, ...]
    baseline: str
    title: str
    paper: str
    paper_rows: dict[str, dict[str, float]]
    only_by_name: bool = False
    classes: tuple[str, ...] = ()

    def paper_difference(self, row: str, metric: str) -> float | None:
        """The paper's value of the row minus the baseline's; None if the paper lacks one."""
        ours, baseline = (
            self.paper_rows.get(name, {}).get(metric) for name in (row, self.baseline)
        )
        return None if ours is None or baseline is None else ours - baseline


def known_families() -> list[str]:
    """The folders of configs/ablations."""
    return sorted(folder.name for folder in _CONFIGS.iterdir() if _rows(folder))


def find_families(name: str) -> list[Family]:
    """The families of a name.

    Args:
        name: a folder of configs/ablations, the path of any folder with configs, or "all": the
            families of configs/ablations that are not ``only_by_name``.

    Raises:
        UserError: the folder or its configs are missing, or its family.json is invalid.
    """
    names = known_families()
    if name == "all":
        families = [_load_family(_CONFIGS / known) for known in names]
        return [family for family in families if not family.only_by_name]
    folder = _CONFIGS / name if name in names else Path(name)
    if not folder.is_dir():
        hint = did_you_mean(name, names) or f"; known: {', '.join(names)}, or name a folder"
        raise UserError(f"unknown ablation '{name}'{hint}")
    return [_load_family(folder)]


def _rows(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml") if not p.name.startswith("Base"))


def _load_family(folder: Path) -> Family:
    configs = _rows(folder)
    if not configs:
        raise UserError(f"folder '{folder}' has no configs: add one .yaml per row")
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}': invalid JSON: {reason(error)}") from error

    def expect(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f"'{path}': {problem}")

    expect(isinstance(content, dict), "expected a JSON object")
    for key in content:
        expect(key in _KEYS, f"unknown key '{key}'{did_you_mean(key, _KEYS)}")
    order, classes = content.get("order", configs), content.get("classes", [])
    for key, names in (("order", order), ("classes", classes)):
        valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
        expect(valid, f"{key}: expected a list of names, got {names!r}")
    baseline, paper_rows = content.get("baseline", configs[0]), content.get("rows", {})
    example, got = '{"ROW": {"mask AP": 30.3}}', json.dumps(paper_rows)[:80]
    expect(_are_values(paper_rows), f"rows: expected numbers as in {example}, got {got}")
    for row in (baseline, *order, *paper_rows):
        expect(row in configs, f"row '{row}' has no config{did_you_mean(str(row), configs)}")
    return Family(
        name=folder.resolve().name,
        folder=folder,
        # Configs that "order" lacks come last.
        rows=tuple(dict.fromkeys((*order, *configs))),
        baseline=baseline,
        title=content.get("title", folder.resolve().name),
        paper=content.get("paper", ""),
        paper_rows=paper_rows,
        only_by_name=content.get("only_by_name", False),
        classes=tuple(dict.fromkeys(classes)),
    )


def _are_values(rows: Any) -> bool:
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        return False
    values = [value for row in rows.values() for value in row.values()]
    return all(isinstance(value, int | float | None) for value in values)


@dataclass
class Run:
    """A row's config with one seed.

    Attributes:
        row: the config file's name without its suffix.
        seed: SEED of the config.
        config: the resolved config, as YAML, without its OUTPUT_DIR.
        data: the data set for evaluation.
        folder: the run's output.
        record: the contents of ``run.json`` in the folder; empty before the run starts.
    """

    row: str
    seed: int
    config: str
    data: str
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the values of all config keys."""
        return _digest(self.config)

    @property
    def finished(self) -> bool:
        return self.record.get("state") == "finished"

    @property
    def failed(self) -> bool:
        return self.record.get("state") == "failed"

    @property
    def results(self) -> dict[str, float]:
        """Metric, e.g. "mask AP" -> its value in percent; empty unless the run is finished."""
        return self.record.get("results", {}) if self.finished else {}


def make_run(row: str, cfg: CfgNode, folder: Path) -> Run:
    """A run of a resolved config, whose SEED is the run's."""
    bare = cfg.clone()
    bare.OUTPUT_DIR = ""
    return Run(row, bare.SEED, bare.dump(), bare.DATASETS.TEST[0], folder)


def share_finished(runs: list[Run], root: Path) -> None:
    """Assigns one folder to runs with the same config, and reads the folders' records.

    Args:
        runs: changed in place. The first run with a config keeps its folder, unless another folder
            already contains a run with that config.
        root: contains the folders of earlier runs, as DATA/FAMILY/ROW/seed_N.
    """
    folders: dict[str, Path] = {}
    for record in sorted(root.glob(f"*/*/*/seed_*/{RECORD}")):
        folders.setdefault(_read_record(record.parent).get("digest", ""), record.parent)
    for run in runs:
        if _read_record(run.folder).get("digest") == run.digest:
            folders[run.digest] = run.folder
    for run in runs:
        run.folder = folders.setdefault(run.digest, run.folder)
        run.record = _read_record(run.folder)


def refuse_changed(runs: list[Run], *, overwrite: bool) -> None:
    """Removes folders that contain a run of another config, or raises without ``overwrite``.

    Raises:
        UserError: there is such a folder, and ``overwrite`` is False.
    """
    changed = [run for run in runs if run.record and run.record.get("digest") != run.digest]
    for run in changed:
        if not overwrite:
            raise UserError(
                f"{run.folder} contains a run of another config ({_difference(run)}); name another "
                "--output, or use --overwrite"
            )
        shutil.rmtree(run.folder, ignore_errors=True)
        run.record = {}


class Processes:
    """Trains each run in its own process.

    Args:
        threads: CPU threads per process.
        keep_weights: whether to keep the checkpoints (150 MB) of finished runs.
    """

    def __init__(self, threads: int, *, keep_weights: bool) -> None:
        self._threads = threads
        self._keep_weights = keep_weights
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def train(self, run: Run) -> None:
        """Trains and evaluates, or continues an interrupted run; then updates the run's record."""
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / CONFIG).write_text(run.config, encoding="utf-8")
        cpu_seconds = run.record.get("cpu_seconds", 0.0)
        self._save_record(run, state="running", cpu_seconds=cpu_seconds)
        command = [sys.executable, "-c", _TRAIN, "--config-file", str(run.folder / CONFIG)]
        command += ["--resume", "OUTPUT_DIR", str(run.folder)]
        with (run.folder / LOG).open("a", encoding="utf-8") as log:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=self._environment()
                )
                self._running.add(process)
            # Unlike wait, wait4 returns this child's CPU time.
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                process.returncode = os.waitstatus_to_exitcode(status)
                self._running.discard(process)
        cpu_seconds += usage.ru_utime + usage.ru_stime
        if self._stopped:
            self._save_record(run, state="running", cpu_seconds=cpu_seconds)
        else:
            self._conclude(run, process.returncode, cpu_seconds)

    def stop(self) -> None:
        """Ends the processes; their runs count as interrupted."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _conclude(self, run: Run, code: int, cpu_seconds: float) -> None:
        """Records the results or the error of a process that has ended."""
        try:
            if code:
                raise ValueError(f"exit code {code}: {_last_line(run.folder / LOG)}")
            # The results of averaged weights replace those of the last weights.
            averaged, last = (
                folder / "inference" / run.data / "metrics.json"
                for folder in (run.folder / "ema", run.folder)
            )
            results = _read_results(averaged if averaged.is_file() else last)
        except (OSError, ValueError) as error:
            self._save_record(run, state="failed", error=str(error), cpu_seconds=cpu_seconds)
            return
        seconds = {"train_seconds": _training_seconds(run), "cpu_seconds": round(cpu_seconds, 1)}
        self._save_record(run, state="finished", results=results, **seconds)
        if not self._keep_weights:
            for checkpoint in [*run.folder.glob("*.pth"), run.folder / "last_checkpoint"]:
                checkpoint.unlink(missing_ok=True)

    def _save_record(self, run: Run, **values: Any) -> None:
        run.record = {"digest": run.digest, "row": run.row, "seed": run.seed, **values}
        new = run.folder / f".{RECORD}"
        new.write_text(json.dumps(run.record, indent=1) + "\n", encoding="utf-8")
        new.replace(run.folder / RECORD)  # atomic: never half written

    def _environment(self) -> dict[str, str]:
        # The processes must import the same package as this one.
        package = str(Path(mask_rcnn_plus.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        threads = str(self._threads)
        return {**_MEMORY, **_WAITING, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}


def _read_record(folder: Path) -> dict[str, Any]:
    """A run's record; empty if it is missing or damaged.

    The digest is computed again from the run's config, since a digest from an earlier version lacks
    the keys added since then.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        results = record.get("results", {})
        seconds = [record.get(f"{kind}_seconds") or 0 for kind in ("cpu", "train")]
        if not all(isinstance(n, int | float) for n in (*results.values(), *seconds)):
            return {}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}
    if record:
        try:
            record["digest"] = _digest((folder / CONFIG).read_text(encoding="utf-8"))
        except _UNREADABLE:
            record["digest"] = "unreadable"
    return record


@cache
def _values(config: str) -> dict[str, Any]:
    """All config keys and their values.

    Keys that the config lacks have their defaults, so that finished runs stay valid when an update
    of this project adds keys.
    """
    values = _flatten(CfgNode.load_cfg(config))
    # The dump turns tuples into lists, as in the config.
    return {**_flatten(CfgNode.load_cfg(get_cfg().dump())), **values}


def _digest(config: str) -> str:
    return hashlib.sha256(json.dumps(_values(config), sort_keys=True).encode()).hexdigest()


def _flatten(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, CfgNode) and value
        values |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


def _difference(run: Run) -> str:
    """The first keys whose values differ between the folder's config and the run's."""
    try:
        old = _values((run.folder / CONFIG).read_text(encoding="utf-8"))
    except _UNREADABLE:
        return "its config is unreadable"
    new = _values(run.config)
    keys = [key for key in {**new, **old} if new.get(key) != old.get(key)]
    changes = [f"{key} was {old.get(key)}, is now {new.get(key)}" for key in keys[:3]]
    return "; ".join(changes) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _read_results(path: Path) -> dict[str, float]:
    metrics = json.loads(path.read_text(encoding="utf-8"))
    results = {}
    for task, key in (("box", "bbox"), ("mask", "segm")):
        for name, value in metrics.get(key, {}).items():
            # AP-NAME is the AP of a class.
            if (name in _METRICS or name.startswith("AP-")) and not math.isnan(value):
                results[f"{task} {name}"] = float(value)
    return results


def _training_seconds(run: Run) -> float | None:
    """Iterations times the median time per iteration, which pauses of the machine do not change."""
    try:
        lines = (run.folder / "metrics.json").read_text(encoding="utf-8").splitlines()
        steps = [step for step in map(json.loads, lines) if "time" in step]
    except (OSError, ValueError):
        steps = []
    if not steps:
        return None
    # Not MAX_ITER, which a run may scale with its batch, or not reach.
    iterations = 1 + max(step["iteration"] for step in steps)
    return round(iterations * statistics.median(step["time"] for step in steps), 1)


def _last_line(log: Path) -> str:
    return (
        (log.read_text(encoding="utf-8", errors="replace").strip() or "no output")
        .splitlines()[-1]
        .strip()[:300]
    )
