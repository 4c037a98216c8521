"""One training run of an ablation: its folder, what is known of it, the process behind it."""

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
from mask_rcnn_plus.errors import UserError

RECORD, CONFIG, LOG = "run.json", "ablation.yaml", "output.txt"
METRICS = tuple(f"{task} {name}" for task in ("box", "mask") for name in ("AP", "AP50", "AP75"))
_TASKS = {"box": "bbox", "mask": "segm"}
# glibc gives maps of some megabytes back to the system after each use, and takes them anew: a
# seventh of a run's CPU time.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
# Threads that wait for each other by spinning hold up whatever else runs on their core.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# What reading a damaged config may raise: yacs does not look at what YAML gives.
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, AssertionError, RecursionError)
_TRAIN = "import sys; from mask_rcnn_plus.engine import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Run:
    """A row's config with one seed.

    Attributes:
        row: the config file's name without its ending.
        seed: SEED of the config.
        config: the resolved config, as YAML, without its OUTPUT_DIR.
        data: name of the data set that is evaluated.
        folder: where the run writes.
        record: what ``run.json`` in the folder says; empty before the run has started.
    """

    row: str
    seed: int
    config: str
    data: str
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The same for runs that would give the same."""
        return _digest(self.config)

    @property
    def finished(self) -> bool:
        return self.record.get("state") == "finished"

    @property
    def failed(self) -> bool:
        return self.record.get("state") == "failed"

    @property
    def results(self) -> dict[str, float]:
        """Metric, e.g. "mask AP", to its value in percent, for what the run has measured."""
        return self.record.get("results", {}) if self.finished else {}


def make_run(row: str, cfg: CfgNode, folder: Path) -> Run:
    """A run of a resolved config; its SEED is the run's."""
    bare = cfg.clone()
    bare.OUTPUT_DIR = ""
    return Run(row, bare.SEED, bare.dump(), bare.DATASETS.TEST[0], folder)


def share_finished(runs: list[Run], root: Path) -> None:
    """Points runs of one config at one folder, and reads what lies there.

    Args:
        runs: changed in place. The first of those with one config keeps its folder, unless a run
            with that config lies in another folder already.
        root: below it, FAMILY/ROW/seed_N are folders of earlier runs.
    """
    places: dict[str, Path] = {}
    for record in sorted(root.glob(f"*/*/seed_*/{RECORD}")):
        places.setdefault(_read_record(record.parent).get("digest", ""), record.parent)
    for run in runs:
        own = _read_record(run.folder)
        if own.get("digest") == run.digest:
            places[run.digest] = run.folder
    for run in runs:
        run.folder = places.setdefault(run.digest, run.folder)
        run.record = _read_record(run.folder)


def refuse_changed(runs: list[Run], *, overwrite: bool) -> None:
    """Makes room for runs whose folder holds a run of another config.

    Raises:
        UserError: there is such a folder, and overwrite is off.
    """
    for run in runs:
        if not run.record or run.record.get("digest") == run.digest:
            continue
        if not overwrite:
            raise UserError(
                f"{run.folder} holds a run of another config ({_difference(run)}); name another "
                "--output, or give --overwrite"
            )
    for run in runs:
        if run.record and run.record.get("digest") != run.digest:
            shutil.rmtree(run.folder, ignore_errors=True)
            run.record = {}


class Processes:
    """The training processes that are running, so that an interruption can end them."""

    def __init__(self, threads: int, *, keep_weights: bool) -> None:
        """Takes the CPU threads of each process, and whether finished checkpoints (150 MB) stay."""
        self._threads = threads
        self._keep_weights = keep_weights
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def train(self, run: Run) -> None:
        """Trains and evaluates, or goes on where an interrupted run has stopped.

        Whatever happens in the process, this ends with a record in the run's folder.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / CONFIG).write_text(run.config)
        spent = run.record.get("cpu_seconds", 0.0)
        self._note(run, {"state": "running", "cpu_seconds": spent})
        command = [sys.executable, "-c", _TRAIN, "--config-file", str(run.folder / CONFIG)]
        command += ["--resume", "OUTPUT_DIR", str(run.folder)]
        with (run.folder / LOG).open("a") as log:
            with self._lock:
                if self._stopped:
                    return None
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=self._environment()
                )
                self._running.add(process)
            # wait4 and not wait: it knows this one child's CPU time.
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                process.returncode = os.waitstatus_to_exitcode(status)
                self._running.discard(process)
        spent += usage.ru_utime + usage.ru_stime
        if self._stopped:
            return self._note(run, {"state": "running", "cpu_seconds": spent})
        self._conclude(run, process.returncode, spent)
        return None

    def stop(self) -> None:
        """Ends the processes; their runs count as interrupted."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _conclude(self, run: Run, code: int, spent: float) -> None:
        try:
            if code:
                raise ValueError(f"exit code {code}: {_last_line(run.folder / LOG)}")
            # Where weights are averaged, the averages are what the run is for.
            folders = [run.folder / "ema", run.folder]
            measured = [one / "inference" / run.data / "metrics.json" for one in folders]
            results = _read_results(next(filter(Path.is_file, measured), measured[-1]))
        except (OSError, ValueError) as error:
            return self._note(run, {"state": "failed", "error": str(error), "cpu_seconds": spent})
        self._note(
            run,
            {
                "state": "finished",
                "results": results,
                "train_seconds": _training_seconds(run),
                "cpu_seconds": round(spent, 1),
            },
        )
        if not self._keep_weights:
            for checkpoint in [*run.folder.glob("*.pth"), run.folder / "last_checkpoint"]:
                checkpoint.unlink(missing_ok=True)
        return None

    def _note(self, run: Run, record: dict[str, Any]) -> None:
        run.record = {"digest": run.digest, "row": run.row, "seed": run.seed, **record}
        new = run.folder / f".{RECORD}"
        new.write_text(json.dumps(run.record, indent=1) + "\n")
        new.replace(run.folder / RECORD)  # never half written

    def _environment(self) -> dict[str, str]:
        # The processes are to import this very package, wherever it lies.
        package = str(Path(mask_rcnn_plus.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        threads = str(self._threads)
        return {**_MEMORY, **_WAITING, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}


def _read(path: Path) -> dict[str, Any]:
    """A record; empty where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    results = content.get("results", {}) if isinstance(content, dict) else None
    if not isinstance(results, dict):
        return {}
    numbers = [*results.values(), *(content.get(f"{of}_seconds") or 0 for of in ("cpu", "train"))]
    return content if all(isinstance(number, int | float) for number in numbers) else {}


def _read_record(folder: Path) -> dict[str, Any]:
    """What a run says of itself; nothing where there is none.

    The digest is made anew from its config, since what an earlier version wrote lacks the keys that
    have come since.
    """
    record = _read(folder / RECORD)
    if record:
        try:
            record["digest"] = _digest((folder / CONFIG).read_text())
        except (*_UNREADABLE, yaml.YAMLError):
            record["digest"] = "unreadable"
    return record


@cache
def _values(config: str) -> dict[str, Any]:
    """The values of a config by key; keys that it lacks are at their defaults, and change nothing.

    So an update of this project does not make finished runs those of another config.
    """
    there = _leaves(CfgNode.load_cfg(config))
    # By way of YAML, where tuples become lists.
    return {**_leaves(CfgNode.load_cfg(get_cfg().dump())), **there}


def _digest(config: str) -> str:
    return hashlib.sha256(json.dumps(_values(config), sort_keys=True).encode()).hexdigest()


def _read_results(path: Path) -> dict[str, float]:
    measured = json.loads(path.read_text())
    results = {}
    for task, key in _TASKS.items():
        for name, value in measured.get(key, {}).items():
            metric = f"{task} {name}"
            # AP-NAME is that of a class.
            if (metric in METRICS or name.startswith("AP-")) and not math.isnan(value):
                results[metric] = float(value)
    return results


def _training_seconds(run: Run) -> float | None:
    """Iterations times an iteration's median time, which a machine's pauses leave as it is."""
    try:
        lines = (run.folder / "metrics.json").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if "time" in step]
    except (OSError, ValueError):
        return None
    if not steps:
        return None
    # Not MAX_ITER, which a run may scale with its batch, or end before.
    iterations = 1 + max(step["iteration"] for step in steps)
    return round(iterations * statistics.median(step["time"] for step in steps), 1)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def _difference(run: Run) -> str:
    """The first keys in which the folder's config differs."""
    try:
        old = _values((run.folder / CONFIG).read_text())
    except (*_UNREADABLE, yaml.YAMLError):
        return "it cannot be read"
    here = _values(run.config)
    keys = [key for key in {**here, **old} if here.get(key) != old.get(key)]
    words = [f"{key} {old.get(key)} there, {here.get(key)} here" for key in keys[:3]]
    return "; ".join(words) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _leaves(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, CfgNode) and value
        leaves.update(_leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return leaves
