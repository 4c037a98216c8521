"""Trains every config of a folder with several seeds, and tabulates what their difference does."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from benchmarks.ablation_family import Family, find_families, known_families
from benchmarks.ablation_plot import plot
from benchmarks.ablation_runs import (
    Processes,
    Run,
    make_run,
    refuse_changed,
    share_finished,
)
from benchmarks.ablation_table import markdown, to_csv
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.config.values import check_components, check_solver
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.engine.checks import check_datasets
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, positive, prepare_output, run_command
from mask_rcnn_tools.check.before_run import check_data
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.ablate"
TABLE, CSV, PLOT = "table.md", "table.csv", "plot.png"

_EPILOG = f"""
Example: {PROGRAM} 2c_pooling --seeds 3 --jobs 2 --output output/ablations
Runs lie in OUTPUT/DATA/FAMILY/ROW/seed_N; {TABLE}, {CSV} and {PLOT} in OUTPUT/DATA/FAMILY, written
anew after every run. The same command again goes on: what is finished is not run again, and rows
of several families with the same config run once. A folder of your own works as well; its
family.json may name "title", "baseline", "order", "paper" and the paper's figures as "rows", and as
"classes" those whose own AP is shown; "all" leaves out a family that is "alone" there.
"""


def main(argv: Sequence[str]) -> int:
    """Runs an ablation.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code: 0, or 1 if a run has failed.

    Raises:
        UserError: something in the arguments, configs or data is wrong; no run has started.
    """
    arguments = _parse(argv)
    if arguments.list:
        _list()
        return 0
    if arguments.name is None:
        raise UserError(f"name an ablation: {', '.join(known_families())}, all, or a folder")
    families = find_families(arguments.name)
    prepare_output(arguments.output, (), overwrite=True)
    plans = {family.name: _plan(family, arguments) for family in families}
    runs = [run for _, planned in plans.values() for run in planned]
    roots = {run.folder.parents[2] for run in runs}
    for root in roots:
        share_finished([run for run in runs if run.folder.parents[2] == root], root)
    refuse_changed(runs, overwrite=arguments.overwrite)
    report = _Report(families, plans, shlex.join([*PROGRAM.split(), *argv]))
    _train(runs, report, arguments)
    return report.conclude(runs)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help="see --list; all; or a folder")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 1 to this (default: 3)")
    parser.add_argument(
        "--data",
        type=_data,
        metavar="TRAIN:TEST",
        help="data sets, e.g. nuclei_train:nuclei_val; by default the configs' own",
    )
    parser.add_argument("--output", type=Path, default=Path("output", "ablations"), metavar="DIR")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    parser.add_argument("--overwrite", action="store_true", help="replace runs of other configs")
    parser.add_argument("--keep-weights", action="store_true", help="keep finished checkpoints")
    parser.add_argument("--list", action="store_true", help="print the ablations, and stop")
    parser.add_overrides()
    # What follows NAME may be options: find where the overrides begin.
    arguments, rest = parser.parse_known_args(_options_first(parser, argv))
    if rest:
        raise UserError(f"unknown argument '{rest[0]}'; see {PROGRAM} --help")
    return arguments


def _options_first(parser: Parser, argv: Sequence[str]) -> list[str]:
    """The arguments with the options moved before NAME, which argparse's REMAINDER needs."""
    options: list[str] = []
    words: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        action = parser._option_string_actions.get(word.split("=")[0])
        if action is None or (len(words) > 1 and len(words) % 2 == 0):
            words.append(word)  # NAME, a key, or a key's value
            position += 1
            continue
        length = 2 if action.nargs is None and "=" not in word else 1
        options += argv[position : position + length]
        position += length
    return options + words


def _data(text: str) -> tuple[str, str]:
    train, colon, test = text.partition(":")
    if not (colon and train and test):
        raise argparse.ArgumentTypeError(f"must be TRAIN:TEST, not '{text}'")
    return train, test


def _list() -> None:
    for name in known_families():
        (family,) = find_families(name)
        print(f"{name}: {family.title}")
        for row in family.rows:
            mark = "  (baseline)" if row == family.baseline else ""
            print(f"  {row}{mark}")


def _plan(family: Family, arguments: argparse.Namespace) -> tuple[CfgNode, list[Run]]:
    """The baseline's config and the runs, checked as far as is possible without running them."""
    runs = []
    data: list[str] = []
    if arguments.data:
        train, test = arguments.data
        data = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)"]
    for row in family.rows:
        cfg = load_config(family.config_file(row), [*data, *arguments.opts])
        name = f"{cfg.DATASETS.SHAPES.NAME}_"
        if not any(one.startswith(name) for one in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
            cfg.DATASETS.SHAPES.ENABLED = False  # another data set was asked for
        _check(cfg, arguments)
        folder = arguments.output / cfg.DATASETS.TEST[0] / family.name / row
        for seed in range(1, arguments.seeds + 1):
            cfg.SEED = seed
            runs.append(make_run(row, cfg, folder / f"seed_{seed}"))
        if row == family.baseline:
            baseline = cfg
    return baseline, runs


def _check(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    check_components(cfg)
    check_solver(cfg, resolve_device(cfg.MODEL.DEVICE))
    prepare_datasets(cfg)
    # The number of classes, which this fills in, is left to the run.
    check_datasets(
        cfg.clone(), argparse.Namespace(eval_only=False, resume=False), check_data=check_data
    )
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} data sets: give one")


class _Report:
    """Writes the families' tables and plots as the runs come in."""

    def __init__(
        self, families: list[Family], plans: dict[str, tuple[CfgNode, list[Run]]], command: str
    ) -> None:
        self._families = families
        self._plans = plans
        self._command = command
        device = resolve_device(next(iter(plans.values()))[0].MODEL.DEVICE)
        self._machine = describe_environment(device)
        # Of this process, which trains nothing.
        self._machine.pop("threads", None)

    def note_threads(self, threads: int, jobs: int) -> None:
        self._machine["runs at a time"] = jobs
        self._machine["threads a run"] = threads

    def folder(self, family: Family, output: Path) -> Path:
        return output / self._plans[family.name][0].DATASETS.TEST[0] / family.name

    def write(self, output: Path) -> None:
        for family in self._families:
            cfg, runs = self._plans[family.name]
            folder = self.folder(family, output)
            folder.mkdir(parents=True, exist_ok=True)
            text = markdown(family, runs, self._facts(cfg))
            (folder / TABLE).write_text(text)
            (folder / CSV).write_text(to_csv(family, runs))
            plot(family, runs, folder / PLOT)

    def conclude(self, runs: list[Run]) -> int:
        failed = {run.folder: run for run in runs if run.failed}
        for run in failed.values():
            print(f"failed: {run.folder}: {run.record.get('error')}", file=sys.stderr)
        return 1 if failed else 0

    def _facts(self, cfg: CfgNode) -> list[str]:
        names = f"{', '.join(cfg.DATASETS.TRAIN)} / {', '.join(cfg.DATASETS.TEST)}"
        solver = cfg.SOLVER
        return [
            f"`{self._command}`",
            f"{names}; baseline: {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images",
            "; ".join(f"{name} {value}" for name, value in self._machine.items()),
        ]


def _train(runs: list[Run], report: _Report, arguments: argparse.Namespace) -> None:
    """Trains what is not finished; the rest of the runs follows even where one fails."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (usable or 1) // arguments.jobs)
    report.note_threads(threads, arguments.jobs)
    # Runs of several families share a folder where their configs are the same.
    shared: dict[Path, list[Run]] = {}
    for run in runs:
        shared.setdefault(run.folder, []).append(run)
    # All rows of a seed before the next seed: an interruption leaves a table of fewer seeds.
    waiting = sorted(
        (group for group in shared.values() if not group[0].finished), key=lambda g: g[0].seed
    )
    report.write(arguments.output)
    processes = Processes(threads, keep_weights=arguments.keep_weights)

    def work(group: list[Run]) -> list[Run]:
        bar.set_postfix_str(str(group[0].folder.relative_to(arguments.output)))
        processes.train(group[0])
        return group

    hidden = not sys.stderr.isatty()
    with tqdm(total=len(shared), unit="run", disable=hidden, dynamic_ncols=True) as bar:
        bar.update(len(shared) - len(waiting))
        pool = ThreadPoolExecutor(arguments.jobs)
        futures = [pool.submit(work, group) for group in waiting]
        try:
            for future in as_completed(futures):
                group = future.result()
                for run in group:
                    run.record = group[0].record
                report.write(arguments.output)
                tqdm.write(_line(group[0], arguments.output), file=sys.stdout)
                sys.stdout.flush()
                bar.update()
        finally:
            processes.stop()
            pool.shutdown(wait=True, cancel_futures=True)


def _line(run: Run, output: Path) -> str:
    name = run.folder.relative_to(output)
    if run.failed:
        return f"{name}: FAILED: {run.record['error']}"
    figures = [f"{m} {run.results[m]:.1f}" for m in ("box AP", "mask AP") if m in run.results]
    return f"{name}: {', '.join(figures)} ({run.record['cpu_seconds']:.0f} s CPU)"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
