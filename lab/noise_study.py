"""Compares margins on training data with label noise: plan, train, report.

    python -m lab.noise_study plan      # lists the runs and estimates how long they take
    python -m lab.noise_study run       # trains them, one per core; continues where it was stopped
    python -m lab.noise_study report    # writes tables and figures of the runs that are there

`--quick` takes the same path in seconds. More seeds for a part of the study, once the rest is there:

    python -m lab.noise_study run --seeds 3 4 --conditions flip30 --heads expface-exact
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from examples.glyphs.arguments import Parser, positive_integer, seed
from examples.glyphs.dataset import DataError

from . import plan
from .plan import TUNED_AT, Cell, Configuration, Run, StudyError
from .pool import train_all
from .results import Results

ROOT = Path(__file__).resolve().parents[1]
FULL_FOLDER, QUICK_FOLDER = ROOT / "lab/results", Path("out/study-quick")
DOCS = ROOT / "docs/analysis.md"
RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Task:
    """Holds what the command line asks for."""

    configuration: Configuration
    results: Results
    cells: list[Cell]
    seeds: list[int]
    workers: int
    docs: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; 2 where the study cannot be done as asked; 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        {"plan": show_plan, "run": run, "report": report}[options.command](console, _task(options))
    except (DataError, StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues with the runs that are missing", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(description="Train margins on clean and noisy labels, and compare them.")
    add = parser.add_argument
    add("command", choices=("plan", "run", "report"))
    add("--quick", action="store_true", help="toy size: does it run?")
    add("--out", type=Path, help=f"folder of {RUNS} (default: that of the committed results)")
    add("--seeds", type=seed, nargs="+", help="of the runs on test (default 0 1 2; with --quick 0 1)")
    add("--heads", nargs="+", help="only these, such as cosface-detached expface-exact")
    add("--conditions", nargs="+", help=f"only these of {', '.join(plan.CONDITIONS)}")
    add("--workers", type=positive_integer, default=os.cpu_count() or 1, help="parallel runs")
    add("--docs", type=Path, nargs="?", const=DOCS, help="report: update the results block of this page")
    return parser


def _task(options: Any) -> Task:
    configuration = plan.quick() if options.quick else plan.full()
    folder = options.out or (QUICK_FOLDER if options.quick else FULL_FOLDER)
    heads = [plan.head_named(name) for name in options.heads or ()]
    seeds = options.seeds or (plan.QUICK_SEEDS if options.quick else plan.SEEDS)
    if configuration.tuning_seed in seeds:
        raise StudyError(f"seeds: {configuration.tuning_seed} is reserved for tuning m and s")
    return Task(
        configuration,
        Results(folder / RUNS, configuration),
        plan.cells(heads, options.conditions),
        sorted(set(seeds)),
        options.workers,
        options.docs,
    )


def show_plan(console: Console, task: Task) -> None:
    """Print the runs and estimate how long the missing ones take; nothing is written."""
    # Before tuning, at each head's first setting, which takes as long as any.
    first = {tuning: task.configuration.trials[tuning[0][0]][0] for tuning in plan.tunings(task.cells)}
    runs = plan.tuning_runs(task.configuration, task.cells)
    runs += plan.test_runs(task.configuration, task.cells, task.seeds, first)
    groups: dict[tuple[str, str], list[Run]] = {}
    for entry in runs:
        groups.setdefault((entry.stage, entry.condition), []).append(entry)
    table = Table("stage", "condition", "heads", "runs", "images per run", title="Runs", title_justify="left")
    for (stage, condition), members in groups.items():
        size = plan.images(members[0], task.configuration)
        table.add_row(
            stage, condition, str(len({entry.head for entry in members})), str(len(members)), f"{size:,}"
        )
    console.print(table)
    here = {entry.name for entry in task.results.load()}
    left = [entry for entry in runs if entry.name not in here]
    rate = images_per_second(task)
    hours = sum(plan.images(entry, task.configuration) for entry in left) / rate / task.workers / 3600
    console.print(
        f"{len(runs) - len(left)} of {len(runs)} runs are there. The rest takes about {hours:.1f} hours with "
        f"{task.workers} workers, at {rate:,.0f} images/s per core"
    )


def images_per_second(task: Task) -> float:
    """Return the median rate of one core over the finished runs, or else over the committed ones."""
    configuration = task.configuration
    records = task.results.load()
    if not records:
        configuration = plan.full()
        records = Results(FULL_FOLDER / RUNS, configuration).load()
    return statistics.median(
        plan.images(entry, configuration) / max(record["seconds"], 0.05)  # stored with one decimal
        for entry, record in records.items()
        if record["failed"] is None
    )


def run(console: Console, task: Task) -> None:
    """Train what is missing: first the tuning trials, then, at the m and s they chose, the runs on test."""
    _train(console, task, plan.tuning_runs(task.configuration, task.cells), "tuning m and s")
    tuned = plan.tune(task.configuration, task.results.load(), task.cells)
    for (head, condition), (m, scale) in tuned.items():
        margin = "" if m is None else f"m = {m:g}, "
        console.print(f"{condition}, {plan.head_name(head)}: {margin}s = {scale:g}")
    _train(console, task, plan.test_runs(task.configuration, task.cells, task.seeds, tuned), "training")


def _train(console: Console, task: Task, runs: Sequence[Run], what: str) -> None:
    """Train the missing ones of `runs`, and append each to the results as it finishes."""
    missing = task.results.missing(runs)
    console.print(f"{what}: {len(runs)} runs, {len(runs) - len(missing)} of them are there")
    total = sum(plan.images(entry, task.configuration) for entry in missing)
    training = train_all(missing, task.configuration, task.workers)
    with closing(training), tqdm(total=total, unit="image", unit_scale=True, disable=not missing) as bar:
        for entry, record in training:
            task.results.append(entry, record)
            bar.update(plan.images(entry, task.configuration))
            bar.write(_summary(entry, record))


def _summary(entry: Run, record: Mapping[str, Any]) -> str:
    result = record["result"]
    how = f"TAR {result['tar'][TUNED_AT]:.3f}, rank-1 {result['rank1']:.3f}" if result else record["failed"]
    return f"{entry.name}: {how}, {record['seconds']:.0f} s"


def report(console: Console, task: Task) -> None:
    """Write tables and figures of all runs in the results, complete or not."""
    from .markdown import write_report  # matplotlib, which training does not need

    console.print(write_report(task.results, task.configuration, task.docs), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
