"""`python -m bench`: exit code 0, 1 where a peer was wrong or a measurement failed, 2 for bad input."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import machine, peers
from bench.cases import DEFAULT, MARGINS, MEMORY, MEMORY_CLASSES, TOY, Case
from bench.report import print_report
from bench.run import Plan, run
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.margins import TARGET_GRADIENTS

ROUNDS, RUNS = 9, 3
TOY_ROUNDS, TOY_RUNS = 3, 1
KIND = ("margin", "scale", "target_gradient")  # options that make a case's kind, and those of its shape
SHAPE = ("rows", "classes", "features")
PLAIN_WIDTH = 140  # columns of a table that goes to a file


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message}\n")


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="python -m bench", description="Seconds and memory of the loss head against its peers.")
    p.add_argument(
        "--toy", action="store_true", help="a tiny case, few rounds: does everything work and agree?"
    )
    p.add_argument("--rows", type=int, metavar="B")
    p.add_argument("--classes", type=int, metavar="C")
    p.add_argument("--features", type=int, metavar="D")
    p.add_argument("--margin", choices=MARGINS, help="at its default strength (default: expface)")
    p.add_argument("--scale", type=float, help="s (default: 64)")
    p.add_argument("--target-gradient", choices=TARGET_GRADIENTS, help="of every peer (default: exact)")
    p.add_argument("--rounds", type=int, help=f"in a run, each peer once in each (default: {ROUNDS})")
    p.add_argument("--runs", type=int, help=f"of which the quietest is reported (default: {RUNS})")
    p.add_argument(
        "--peers",
        nargs="+",
        default=list(peers.PEERS),
        metavar="PEER",
        help=f"of {', '.join(peers.PEERS)} (the default), ours@BYTES (workspace), package.module:ATTRIBUTE",
    )
    p.add_argument("--workspace-bytes", type=int, help='of the peer "ours" (default: 256 MiB)')
    p.add_argument(
        "--memory-classes",
        type=int,
        nargs="+",
        metavar="C",
        help=f"class counts of the memory sweep at B={MEMORY.rows}, D={MEMORY.features} "
        f"(default: {' '.join(map(str, MEMORY_CLASSES))})",
    )
    p.add_argument("--no-memory", action="store_true", help="measure seconds only")
    p.add_argument("--spin", action="store_true", help="time while another process keeps a core busy")
    p.add_argument("--model", metavar="GPU", help="count a step's cost on h100, a100, …; run nothing")
    p.add_argument("--dtype", help="of --model: of rows and centres (default: bfloat16)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    return p


def plan_of(options: argparse.Namespace, command: str) -> Plan:
    """The plan that the options describe; ValueError for one that cannot be carried out."""
    case = _replaced(TOY if options.toy else DEFAULT, options, (*SHAPE, *KIND))
    _check_fits(case)
    default_rounds, default_runs = (TOY_ROUNDS, TOY_RUNS) if options.toy else (ROUNDS, RUNS)
    rounds = default_rounds if options.rounds is None else options.rounds
    runs = default_runs if options.runs is None else options.runs
    for name, value in (("rounds", rounds), ("runs", runs)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")

    timed, memory_peers = _peers(options)
    if all(peers.get(name).why_not(case) for name in timed):
        raise ValueError(f"none of the peers can run this case: {peers.get(timed[0]).why_not(case)}")
    return Plan(
        case=case,
        peers=timed,
        rounds=rounds,
        runs=runs,
        memory_peers=() if options.no_memory else memory_peers,
        memory_cases=() if options.no_memory else (case, *_sweep(options)),
        spin=options.spin,
        command=command,
    )


def _modelled(options: argparse.Namespace) -> str:
    from bench import model  # needs Triton, which not every system has

    workspace = _workspace_bytes(options)
    return model.report(
        _replaced(DEFAULT, options, (*SHAPE, *KIND)),
        options.model,
        options.dtype or "bfloat16",
        DEFAULT_WORKSPACE_BYTES if workspace is None else workspace,
    )


def _replaced(case: Case, options: argparse.Namespace, names: Sequence[str]) -> Case:
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(case, **given)


def _workspace_bytes(options: argparse.Namespace) -> int | None:
    workspace: int | None = options.workspace_bytes
    if workspace is not None and workspace < 0:
        raise ValueError(f"workspace-bytes: expected at least 0, got {workspace}")
    return workspace


def _peers(options: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Peers that are timed, and those whose memory is measured: ours without workspace too.

    A toy run only sees whether measuring works, and compiling again in another process takes too long.
    """
    workspace = _workspace_bytes(options)
    ours = "ours" if workspace is None else f"ours@{workspace}"
    timed = tuple(dict.fromkeys(ours if name == "ours" else name for name in options.peers))
    for name in timed:
        peers.get(name)
    if options.toy:
        return timed, tuple(name for name in timed if not peers.get(name).compiles)
    return timed, tuple(dict.fromkeys([*timed, "ours@0"])) if ours in timed else timed


def _sweep(options: argparse.Namespace) -> list[Case]:
    """Cases of the memory sweep. The default ones may be too large for a machine: then their rows say so."""
    classes = () if options.toy else MEMORY_CLASSES
    if options.memory_classes is not None:
        classes = options.memory_classes
    cases = [dataclasses.replace(_replaced(MEMORY, options, KIND), classes=count) for count in classes]
    if options.memory_classes is not None:
        for case in cases:
            _check_fits(case)
    return cases


def _check_fits(case: Case) -> None:
    need, free = 2 * case.gradient_bytes, machine.available_bytes()
    if free is not None and need > free:
        raise ValueError(
            f"B={case.rows}, C={case.classes}, D={case.features} does not fit: inputs and gradients take "
            f"{need / 1e9:.4g} GB, {free / 1e9:.3g} GB are free"
        )


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    try:
        if options.model is not None:
            print(_modelled(options))
            return 0
        if options.dtype is not None:
            raise ValueError("dtype: is of --model; what is timed here is float32")
        plan = plan_of(options, shlex.join(["python", "-m", "bench", *argv]))
        if options.json is not None and not options.json.parent.is_dir():
            raise ValueError(f"json: there is no directory {options.json.parent}")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    out, err = Console(), Console(stderr=True)
    if not out.is_terminal:
        out = Console(width=PLAIN_WIDTH)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        result = run(plan, progress)
    if options.json is not None:
        options.json.write_text(result.to_json())
    print_report(result, out)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
