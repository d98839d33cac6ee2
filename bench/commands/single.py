"""`python -m bench`: one case, in several runs, and its memory; or a step's model on a GPU (`--model`)."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import allocator, cuda, peers, show
from bench.cases import AUTOCASTS, DEFAULT, DEVICES, DTYPES, MEMORY, MEMORY_CLASSES, TOY, Case
from bench.commands.options import (
    OUT,
    Parser,
    add_peers,
    at_least,
    check_fits,
    file_to_write,
    in_out,
)
from bench.peers.base import terms
from bench.report import print_report
from bench.run import Plan, run
from expface_kernels.checks import LARGEST_TENSOR
from expface_kernels.cli.numbers import byte_count, count
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.margin_spec import MARGINS
from expface_kernels.margins import TARGET_GRADIENTS

ROUNDS, RUNS = 9, 3
TOY_ROUNDS, TOY_RUNS = 3, 1
JSON, TOY_JSON = "bench.json", "bench-toy.json"
TOY_NOTE = "A toy run: it shows that everything works and agrees. Timings at this size mean nothing."
KIND = ("margin", "scale", "target_gradient", "device", "dtype", "autocast")  # what makes a case's kind
SHAPE = ("rows", "classes", "features")
# Of --model, which measures nothing: everything else would be ignored.
MODELLED = {"model", "json", "workspace_bytes", "margin", "scale", "target_gradient", "dtype", *SHAPE}


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m bench",
        description="Seconds and memory of the loss head against its peers at one shape.",
        epilog="python -m bench COMMAND --help, with COMMAND one of sweep, gpu, compare, plots, readme; "
        "python -m bench --quick is python -m bench sweep --quick, which ends within 2 minutes.",
    )
    p.add_argument(
        "--toy", action="store_true", help="a tiny case, few rounds: does everything work and agree?"
    )
    p.add_argument("--rows", type=count, metavar="B")
    p.add_argument("--classes", type=count, metavar="C")
    p.add_argument("--features", type=count, metavar="D")
    p.add_argument("--margin", choices=MARGINS, help="at its default strength (default: expface)")
    p.add_argument("--scale", type=float, help="s (default: 64)")
    p.add_argument("--target-gradient", choices=TARGET_GRADIENTS, help="of every peer (default: exact)")
    p.add_argument("--device", choices=DEVICES, help="(default: cpu)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of embeddings and centres (default: float32)")
    p.add_argument("--autocast", choices=list(AUTOCASTS), help="around the forward (default: none)")
    p.add_argument("--rounds", type=int, help=f"in a run, each peer once in each (default: {ROUNDS})")
    p.add_argument("--runs", type=int, help=f"of which the quietest is reported (default: {RUNS})")
    add_peers(p, list(peers.PEERS))
    p.add_argument("--workspace-bytes", type=byte_count, help='of the peer "ours" (default: 256 MiB)')
    p.add_argument(
        "--memory-classes",
        type=count,
        nargs="+",
        metavar="C",
        help=f"class counts of the memory sweep at B={MEMORY.rows}, D={MEMORY.features} "
        f"(default: {' '.join(map(str, MEMORY_CLASSES))})",
    )
    p.add_argument("--no-memory", action="store_true", help="measure seconds only")
    p.add_argument("--spin", action="store_true", help="time while another process keeps a core busy")
    p.add_argument(
        "--keep-memory",
        action="store_true",
        help="tell malloc to keep what is freed, as suits heads that allocate in every step",
    )
    p.add_argument(
        "--model",
        metavar="GPU",
        help="count a step's cost on h100, a100, …, in bfloat16 unless said; run nothing",
    )
    p.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help=f"write the result there (default: {OUT / JSON}, or {OUT / TOY_JSON}; of --model: nowhere)",
    )
    return p


def plan_of(options: argparse.Namespace, command: str) -> Plan:
    """The plan that the options describe; ValueError for one that cannot be carried out."""
    if options.device == "cuda" and (reason := cuda.unavailable()):
        raise ValueError(f"device: {reason}")
    if options.keep_memory and (reason := allocator.unavailable()):
        raise ValueError(f"keep-memory: {reason}")
    case = _replaced(TOY if options.toy else DEFAULT, options, (*SHAPE, *KIND))
    check_fits(case)
    default_rounds, default_runs = (TOY_ROUNDS, TOY_RUNS) if options.toy else (ROUNDS, RUNS)
    rounds = default_rounds if options.rounds is None else options.rounds
    runs = default_runs if options.runs is None else options.runs
    at_least("rounds", rounds, 1)
    at_least("runs", runs, 1)
    timed, memory_peers = _peers(options)
    reasons = [peer.why_not(terms(peer, case)) for peer in map(peers.get, timed)]
    if all(reasons):
        raise ValueError(f"none of the peers can run this case: {reasons[0]}")
    return Plan(
        case=case,
        peers=timed,
        rounds=rounds,
        runs=runs,
        memory_peers=() if options.no_memory else memory_peers,
        memory_cases=() if options.no_memory else (case, *_sweep(options)),
        spin=options.spin,
        keep_memory=options.keep_memory,
        command=command,
    )


def _modelled(options: argparse.Namespace, command: str) -> None:
    """Prints the model, and writes it as JSON; ValueError for an option that has nothing to do with it."""
    from bench import model  # needs Triton, which not every system has

    for name, value in vars(options).items():
        if name not in MODELLED and value != parser().get_default(name):
            raise ValueError(f"{name.replace('_', '-')}: --model counts a step and measures nothing")
    workspace = options.workspace_bytes
    case = _replaced(dataclasses.replace(DEFAULT, dtype="bfloat16"), options, (*SHAPE, *KIND))
    if max(case.rows, case.features) * case.classes > LARGEST_TENSOR:
        raise ValueError(f"classes: expected at most 2**59 logits and weights, got C = {case.classes:,}")
    found = model.Model.of(
        case,
        options.model,
        DEFAULT_WORKSPACE_BYTES if workspace is None else workspace,
        command,
    )
    print(found.report())
    if options.json is not None:
        options.json.write_text(found.to_json())


def _replaced(case: Case, options: argparse.Namespace, names: Sequence[str]) -> Case:
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(case, **given)


def _peers(options: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Peers that are timed, and those whose memory is measured: ours without workspace too.

    A toy run only sees whether measuring works, and compiling again in another process takes too long.
    """
    workspace = options.workspace_bytes
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
            check_fits(case)
    return cases


def main(argv: Sequence[str]) -> int:
    """Exit code 0, 1 where a peer was wrong or a measurement failed, 2 for bad input."""
    options = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "bench", *argv])
    try:
        if options.json is not None:
            file_to_write("json", options.json)
        if options.model is not None:
            _modelled(options, command)
            return 0
        plan = plan_of(options, command)
        path = file_to_write("json", options.json or in_out("json", TOY_JSON if options.toy else JSON))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    with show.progress() as progress:
        result = run(plan, progress)
    path.write_text(result.to_json())
    out = show.output()
    print_report(result, out)
    print(f"wrote {path}")
    if options.toy:
        out.line(TOY_NOTE)
    return 0 if result.ok else 1
