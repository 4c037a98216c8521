"""Trains every config of a folder with several seeds, and tabulates the differences."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from benchmarks.ablation_runs import (
    Family,
    Processes,
    Run,
    find_families,
    known_families,
    make_run,
    refuse_changed,
    share_finished,
)
from benchmarks.ablation_table import markdown, plot, to_csv
from benchmarks.harness import facts
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.config.values import check_components, check_solver
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.engine.checks import check_datasets
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, UsageError, positive, run_command
from mask_rcnn_tools.check.before_run import check_data
from mask_rcnn_tools.environment import describe_environment
from mask_rcnn_tools.files import prepare_output
from mask_rcnn_tools.machine import usable_cpus

PROGRAM = "python -m benchmarks.ablate"
TABLE, CSV, PLOT = "table.md", "table.csv", "plot.png"

_EPILOG = f"""
example:
  {PROGRAM} 2c_pooling --seeds 3 --jobs 2 --output output/ablations

Each run writes into OUTPUT/DATA/FAMILY/ROW/seed_N. After each run {TABLE}, {CSV} and
{PLOT} in OUTPUT/DATA/FAMILY are updated. The same command continues where it stopped: it does not
repeat finished runs, and runs rows with the same config once. NAME may also be a folder of your own
configs. Its family.json may contain "title", "baseline", "order", "paper", "rows" (the paper's
values) and "classes" (classes whose own AP is shown). "all" skips a family with
"only_by_name": true.
"""


@dataclass
class Plan:
    """A family, its baseline's config, and its runs."""

    family: Family
    baseline: CfgNode
    runs: list[Run]


def main(argv: Sequence[str]) -> int:
    """Runs an ablation; the exit code is 1 if a run has failed."""
    arguments = _parse(argv)
    if arguments.list:
        _list()
        return 0
    if not arguments.positionals:
        raise UsageError(f"name an ablation: {', '.join(known_families())}, all, or a folder")
    families = find_families(arguments.positionals[0])
    prepare_output(arguments.output, (), overwrite=True)
    plans = [_plan(family, arguments) for family in families]
    runs = [run for plan in plans for run in plan.runs]
    share_finished(runs, arguments.output)
    refuse_changed(runs, overwrite=arguments.overwrite)
    _train(plans, shlex.join([*PROGRAM.split(), *argv]), arguments)
    failed = {run.folder: run for run in runs if run.failed}
    for run in failed.values():
        print(f"failed: {run.folder}: {run.record.get('error')}", file=sys.stderr)
    return 1 if failed else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("--seeds", type=positive, default=3, metavar="N", help="use seeds 1 to N (default: 3)")
    add(
        "--data",
        type=_data,
        default=[],
        metavar="TRAIN:TEST",
        help="data sets, e.g. nuclei_train:nuclei_val (default: those of the configs)",
    )
    output = Path("output", "ablations")
    add("--output", type=Path, default=output, metavar="FOLDER", help=f"default: {output}")
    add("--jobs", type=positive, default=1, help="runs at a time (default: 1)")
    add("--overwrite", action="store_true", help="replace runs of other configs")
    add("--keep-weights", action="store_true", help="keep the checkpoints of finished runs")
    add("--list", action="store_true", help="print the ablations and exit")
    add(
        "positionals",
        nargs="*",
        metavar="NAME [KEY VALUE]",
        help="an ablation (see --list), all, or a folder; then config keys, as for train_net.py",
    )
    return parser.parse_intermixed_args(argv)


def _data(text: str) -> list[str]:
    """Argument ``type``: TRAIN:TEST as config keys and values."""
    train, _, test = text.partition(":")
    if not (train and test):
        raise argparse.ArgumentTypeError(f"must be TRAIN:TEST, not '{text}'")
    return ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)"]


def _list() -> None:
    for name in known_families():
        (family,) = find_families(name)
        print(f"{name}: {family.title}")
        for row in family.rows:
            print(f"  {row}" + "  (baseline)" * (row == family.baseline))


def _plan(family: Family, arguments: argparse.Namespace) -> Plan:
    """The family's runs, checked as far as possible before they start."""
    overrides = [*arguments.data, *arguments.positionals[1:]]
    runs = []
    for row in family.rows:
        cfg = load_config(family.folder / f"{row}.yaml", overrides)
        shapes = f"{cfg.DATASETS.SHAPES.NAME}_"
        if not any(d.startswith(shapes) for d in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
            cfg.DATASETS.SHAPES.ENABLED = False  # the runs use other data sets
        _check(cfg)
        folder = arguments.output / cfg.DATASETS.TEST[0] / family.name / row
        for seed in range(1, arguments.seeds + 1):
            cfg.SEED = seed
            runs.append(make_run(row, cfg, folder / f"seed_{seed}"))
        if row == family.baseline:
            baseline = cfg
    return Plan(family, baseline, runs)


def _check(cfg: CfgNode) -> None:
    check_components(cfg)
    check_solver(cfg, resolve_device(cfg.MODEL.DEVICE))
    prepare_datasets(cfg)
    arguments = argparse.Namespace(eval_only=False, resume=False)
    # A copy: the run itself sets the number of classes.
    check_datasets(cfg.clone(), arguments, check_data=check_data)
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST: expected one data set, got {len(cfg.DATASETS.TEST)}")


def _train(plans: list[Plan], command: str, arguments: argparse.Namespace) -> None:
    """Trains the unfinished runs and updates the tables; a failed run does not stop the others."""
    threads = max(1, usable_cpus() // arguments.jobs)
    machine = describe_environment(resolve_device(plans[0].baseline.MODEL.DEVICE))
    del machine["threads"]  # of this process, which does not train
    machine |= {"runs at a time": arguments.jobs, "threads per run": threads}

    def write_tables() -> None:
        for plan in plans:
            _write_tables(plan, command, facts(machine), arguments.output)

    # Runs with the same config share a folder.
    shared: dict[Path, list[Run]] = {}
    for run in (run for plan in plans for run in plan.runs):
        shared.setdefault(run.folder, []).append(run)
    waiting = [group for group in shared.values() if not group[0].finished]
    # All rows of a seed before the next seed: an interruption leaves a table of fewer seeds.
    waiting.sort(key=lambda group: group[0].seed)
    write_tables()
    processes = Processes(threads, keep_weights=arguments.keep_weights)

    def train(group: list[Run]) -> list[Run]:
        bar.set_postfix_str(str(group[0].folder.relative_to(arguments.output)))
        processes.train(group[0])
        return group

    hidden = not sys.stderr.isatty()
    with tqdm(total=len(shared), unit="run", disable=hidden, dynamic_ncols=True) as bar:
        bar.update(len(shared) - len(waiting))
        pool = ThreadPoolExecutor(arguments.jobs)
        futures = [pool.submit(train, group) for group in waiting]
        try:
            for future in as_completed(futures):
                group = future.result()
                for run in group:
                    run.record = group[0].record
                write_tables()
                tqdm.write(_line(group[0], arguments.output), file=sys.stdout)
                sys.stdout.flush()
                bar.update()
        finally:
            processes.stop()
            pool.shutdown(wait=True, cancel_futures=True)


def _write_tables(plan: Plan, command: str, machine: str, output: Path) -> None:
    cfg = plan.baseline
    names = f"{', '.join(cfg.DATASETS.TRAIN)} / {', '.join(cfg.DATASETS.TEST)}"
    training = f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"
    paragraphs = [f"`{command}`", f"{names}; baseline: {training}", machine]
    folder = output / cfg.DATASETS.TEST[0] / plan.family.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(markdown(plan.family, plan.runs, paragraphs), encoding="utf-8")
    (folder / CSV).write_text(to_csv(plan.family, plan.runs), encoding="utf-8")
    plot(plan.family, plan.runs, folder / PLOT)


def _line(run: Run, output: Path) -> str:
    name = run.folder.relative_to(output)
    if run.failed:
        return f"{name}: FAILED: {run.record['error']}"
    metrics = [f"{m} {run.results[m]:.1f}" for m in ("box AP", "mask AP") if m in run.results]
    return f"{name}: {', '.join(metrics)} ({run.record['cpu_seconds']:.0f} s CPU)"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
