"""`python -m bench sweep`: seconds and memory against classes, rows, features, workspace; `gpu`: there.

Exit code 0, 1 where a peer was wrong or a measurement failed, 2 for bad input, 130 where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import cuda, plans, plots, show
from bench.commands.options import (
    OUT,
    Parser,
    add_peers,
    at_least,
    check_fits,
    checked_peers,
    file_to_write,
    folder_to_write,
    in_out,
)
from bench.plans import Preset
from bench.sweep import Plan, Run
from bench.sweep_report import print_sweep
from bench.sweep_result import AXES, Sweep
from expface_kernels.cli.numbers import count
from expface_kernels.margin_spec import MARGINS
from expface_kernels.margins import TARGET_GRADIENTS

STEM, GPU_STEM = "bench-sweep", "bench-gpu"
"""Of the names in OUT."""
OTHERS = "bench-sweep-quick and bench-sweep-toy where asked for"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def sweep_parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m bench sweep", description="Seconds and memory against C, B, D and workspace.")
    size = p.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="small shapes, no compiled peers: within 2 minutes"
    )
    size.add_argument("--toy", action="store_true", help="tiny shapes: does everything work and agree?")
    for name, letter in zip(AXES, "CBD", strict=True):
        p.add_argument(f"--{name}", type=count, nargs="+", metavar=letter, help=f"values of {letter}")
    p.add_argument("--margin", choices=MARGINS, help="at its default strength (default: expface)")
    p.add_argument("--target-gradient", choices=TARGET_GRADIENTS, help="(default: exact)")
    p.add_argument(
        "--forward-only", action="store_true", help="no backward at all (default: both directions)"
    )
    _add_common(p, plans.CPU_PEERS, f"{OUT / STEM}.json, {OTHERS}", f"{OUT / STEM}, {OTHERS}")
    return p


def gpu_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m bench gpu",
        description="B in 256, 1024, 4096 by C in 100k, 1M, 4M at D=512, bfloat16 autocast, on this GPU.",
    )
    _add_common(p, plans.GPU_PEERS, "bench/results/gpu-CARD.json", str(OUT / GPU_STEM))
    return p


def _add_common(p: argparse.ArgumentParser, peers: Sequence[str], json: str, folder: str) -> None:
    """Options of both, with these defaults."""
    add_peers(p, peers)
    p.add_argument("--rounds", type=int, help="at most, of each shape")
    p.add_argument("--seconds", type=float, help="the time that all may take; fewer rounds and peers keep it")
    p.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help=f"write the result there, after every shape (default: {json})",
    )
    p.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help=f"draw four PNGs there, if matplotlib is installed (default: {folder})",
    )


def preset_of(options: argparse.Namespace) -> Preset:
    """The named sweep with the options' changes; ValueError for one that cannot be carried out."""
    preset = plans.TOY if options.toy else plans.QUICK if options.quick else plans.FULL
    kind = {n: getattr(options, n) for n in ("margin", "target_gradient") if getattr(options, n) is not None}
    grid = preset.grid
    grid = dataclasses.replace(
        grid, many=dataclasses.replace(grid.many, **kind), main=dataclasses.replace(grid.main, **kind)
    )
    lines = {name: getattr(options, name) for name in AXES}
    if any(lines.values()):
        # Only the lines that were asked for.
        classes, rows, features = (tuple(lines[name] or ()) for name in AXES)
        grid = dataclasses.replace(grid, classes=classes, rows=rows, features=features)
        for case in grid.cases():
            check_fits(case)
    preset = dataclasses.replace(preset, grid=grid)
    if options.forward_only:
        preset = dataclasses.replace(preset, directions=(False,))
    if (options.quick or options.toy) and options.peers == list(plans.CPU_PEERS):
        options.peers = list(preset.peers)
    return _changed(preset, options)


def _changed(preset: Preset, options: argparse.Namespace) -> Preset:
    for name, least in (("rounds", 1), ("seconds", 1)):
        if (value := getattr(options, name)) is not None:
            at_least(name, value, least)
            preset = dataclasses.replace(preset, **{name: value})
    return dataclasses.replace(preset, peers=checked_peers(options.peers, preset))


def main(argv: Sequence[str]) -> int:
    """The sweep on the CPU."""
    options = sweep_parser().parse_args(argv)
    try:
        preset = preset_of(options)
        plan = plans.plan(preset, preset.peers, shlex.join(["python", "-m", "bench", "sweep", *argv]))
        stem = STEM + "-quick" * options.quick + "-toy" * options.toy
        if options.json is not None:
            file_to_write("json", options.json)
        folder = _folder(options.plots, stem)
        path = options.json or file_to_write("json", in_out("json", f"{stem}.json"))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return _run(plan, path, folder)


def _folder(asked: Path | None, stem: str) -> Path | None:
    """Of the pictures: as asked, else in OUT; None where nobody asked and nothing can be drawn."""
    if (reason := plots.unavailable()) is None:
        return folder_to_write("plots", asked or in_out("plots", stem))
    if asked is not None:
        raise ValueError(f"plots: {reason}")
    print(f"no pictures: {reason}", file=sys.stderr)
    return None


def gpu_main(argv: Sequence[str]) -> int:
    """The sweep on a GPU."""
    options = gpu_parser().parse_args(argv)
    try:
        if (reason := cuda.unavailable()) is not None:
            raise ValueError(reason)
        preset = _changed(plans.GPU, options)
        path = options.json or RESULTS / f"gpu-{slug(cuda.describe()['card'])}.json"
        file_to_write("json", path)
        folder = _folder(options.plots, GPU_STEM)
        plan = plans.gpu_plan(preset, preset.peers, shlex.join(["python", "-m", "bench", "gpu", *argv]))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return _run(plan, path, folder)


def slug(name: str) -> str:
    """A card's name as part of a file's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _run(plan: Plan, path: Path, folder: Path | None) -> int:
    """The JSON goes to `path`, pictures into `folder`."""

    def save(sweep: Sweep) -> None:
        # In one go: who stops us while we write finds the file of the shape before.
        part = path.with_name(path.name + ".part")
        part.write_text(sweep.to_json())
        part.replace(path)

    with show.progress() as progress:
        sweep = Run(plan, progress, save).run()
    save(sweep)
    print_sweep(sweep, show.output())
    for written in [path, *([] if folder is None else plots.draw(sweep, folder))]:
        print(f"wrote {written}")
    if not sweep.complete:
        return 130
    return 0 if sweep.ok else 1
