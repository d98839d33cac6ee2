"""What each margin does to a training set whose labels are partly wrong: plan, train, report.

    python -m examples.glyphs.noise_study plan      # which runs there are and how long they take
    python -m examples.glyphs.noise_study run       # train them, two at once; goes on where it was stopped
    python -m examples.glyphs.noise_study report    # tables and pictures of what there is

`--quick` walks the same path in some seconds. More seeds for a part of it, once the rest is there:

    python -m examples.glyphs.noise_study run --seeds 3 4 --conditions flip30 --heads expface-exact
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from examples.glyphs.dataset import DataError
from examples.glyphs.study import plan
from examples.glyphs.study.choice import SCORED_AT, choose
from examples.glyphs.study.pace import Pace, measured_rate
from examples.glyphs.study.plan import Cell, Configuration, Run, StudyError
from examples.glyphs.study.store import Store
from examples.glyphs.study.workers import train_all

ROOT = Path(__file__).resolve().parents[2]
FULL_FOLDER, QUICK_FOLDER = ROOT / "examples/glyphs/study/results", Path("out/study-quick")
DOCS = ROOT / "docs/analysis.md"


@dataclass(frozen=True)
class Task:
    """What the command line asks for."""

    size: str
    configuration: Configuration
    store: Store
    cells: list[Cell]
    seeds: list[int]
    workers: int
    docs: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 where the study cannot be done as asked; 130 where it was stopped."""
    options = _parser().parse_args(arguments)
    console = Console()
    commands: dict[str, Callable[[Console, Task], None]] = {"plan": show_plan, "run": run, "report": report}
    try:
        commands[options.command](console, _task(options))
    except (DataError, StudyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train margins on clean and on wrong labels, and compare them."
    )
    add = parser.add_argument
    add("command", choices=("plan", "run", "report"))
    add("--quick", action="store_true", help="toy size: does it run?")
    add("--out", type=Path, help="folder of the runs (default: where the committed ones are)")
    add("--seeds", type=_seed, nargs="+", help="of the runs on test (default 0 1 2; with --quick 0 1)")
    add("--heads", nargs="+", help="only these, such as cosface-detached expface-exact")
    add("--conditions", nargs="+", help=f"only these of {', '.join(plan.CONDITIONS)}")
    add("--workers", type=_positive, default=os.cpu_count() or 1, help="runs at once (default one a core)")
    add("--docs", type=Path, nargs="?", const=DOCS, help="report: fill its block in this page as well")
    return parser


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a seed of 0 or more, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _task(options: argparse.Namespace) -> Task:
    size = "quick" if options.quick else "full"
    configuration = plan.quick() if options.quick else plan.full()
    folder = options.out or (QUICK_FOLDER if options.quick else FULL_FOLDER)
    heads = [plan.head_named(name) for name in options.heads or ()]
    seeds = options.seeds or (plan.QUICK_SEEDS if options.quick else plan.SEEDS)
    if configuration.choice_seed in seeds:
        raise StudyError(f"seeds: {configuration.choice_seed} is the one that m and s are chosen with")
    return Task(
        size,
        configuration,
        Store(folder, configuration),
        plan.cells(heads, options.conditions),
        sorted(set(seeds)),
        options.workers,
        options.docs,
    )


def show_plan(console: Console, task: Task) -> None:
    """Print what would be trained and how long that takes; nothing is written."""
    runs = [*plan.choice_runs(task.configuration, task.cells), *_judged_at_any(task)]
    groups: dict[tuple[str, str], list[Run]] = {}
    for entry in runs:
        groups.setdefault((entry.stage, entry.condition), []).append(entry)
    table = Table(title="Runs", title_justify="left")
    for column in ("stage", "condition", "heads", "runs", "images each"):
        table.add_column(column, justify="left" if column in ("stage", "condition") else "right")
    for (stage, condition), members in groups.items():
        heads = {entry.head for entry in members}
        size = plan.images(members[0], task.configuration)
        table.add_row(stage, condition, str(len(heads)), str(len(members)), f"{size:,}")
    console.print(table)
    left = _not_there(task, runs)
    rate = measured_rate(task.store, task.configuration)
    hours = Pace(rate, task.workers).text(sum(plan.images(entry, task.configuration) for entry in left))
    console.print(
        f"{len(runs) - len(left)} of {len(runs)} runs are there. The rest: about {hours} with {task.workers} "
        f"at once, at {rate:,.0f} images/s a core"
    )


def _judged_at_any(task: Task) -> list[Run]:
    """The runs on test before m and s are chosen: at each head's first try, which takes as long as any."""
    first = {choice: task.configuration.tries[choice[0][0]][0] for choice in plan.choices(task.cells)}
    return plan.judged_runs(task.configuration, task.cells, task.seeds, first)


def _not_there(task: Task, runs: Sequence[Run]) -> list[Run]:
    return [entry for entry in runs if not task.store.path(entry).exists()]


def run(console: Console, task: Task) -> None:
    """Train what is missing: first the tries, then, at the m and s they chose, the runs on test."""
    task.store.open()
    tries = plan.choice_runs(task.configuration, task.cells)
    later = sum(plan.images(entry, task.configuration) for entry in _not_there(task, _judged_at_any(task)))
    _train(console, task, tries, later, "choosing m and s")
    chosen = choose(task.configuration, _load(task, tries), task.cells)
    for (head, condition), (m, scale) in chosen.items():
        margin = "" if m is None else f"m = {m:g}, "
        console.print(f"{condition}, {plan.head_name(head)}: {margin}s = {scale:g}")
    judged = plan.judged_runs(task.configuration, task.cells, task.seeds, chosen)
    _train(console, task, judged, 0, "training")


def _load(task: Task, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
    """The JSON of those `runs` that were made."""
    loaded = ((entry, task.store.load(entry)) for entry in runs)
    return {entry: record for entry, record in loaded if record is not None}


def _train(console: Console, task: Task, runs: Sequence[Run], later: int, what: str) -> None:
    """Train those of `runs` that are not there, a line for each; `later`: images of the stage after it."""
    there = _load(task, runs)
    missing = [entry for entry in runs if entry not in there]
    console.print(f"{what}: {len(runs)} runs, {len(there)} of them are there")
    if not missing:
        return
    size = {entry: plan.images(entry, task.configuration) for entry in missing}
    progress_of: dict[Run, float] = {}
    pace = Pace(None, task.workers)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    training = train_all(missing, task.size, task.store.folder, task.workers)
    with closing(training), Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"0/{len(missing)}", total=sum(size.values()), left="")
        finished = 0
        for event in training:
            progress_of[event.run] = event.share
            trained = sum(share * size[entry] for entry, share in progress_of.items())
            pace.update(trained)
            left = f"{pace.text(sum(size.values()) - trained + later)} left"
            if event.done is not None:
                finished += 1
                line = f"[{finished}/{len(missing)}] {_summary(event.done)}; {left}"
                console.print(line, markup=False, soft_wrap=True)
            progress.update(bar, completed=trained, left=left, description=f"{finished}/{len(missing)}")


def _summary(done: Mapping[str, Any]) -> str:
    result = done["result"]
    how = f"TAR {result['tar'][SCORED_AT]:.3f}, rank-1 {result['rank1']:.3f}" if result else done["failed"]
    return f"{done['done']}: {how}, {done['seconds']:.0f} s"


def report(console: Console, task: Task) -> None:
    """Write tables and pictures of all runs that are in the folder, complete or not."""
    from examples.glyphs.study.report import write_report  # matplotlib, which training does not need

    console.print(write_report(task.store, task.configuration, task.docs), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
