"""`python -m bench`: exit code 0, 1 where a peer was wrong or a measurement failed, 2 for bad input.

Without a command, the quick sweep (`--quick`) or a single case.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from bench import machine, measure, peers, plans, plots
from bench.cases import AUTOCASTS, DEFAULT, DEVICES, DTYPES, Case
from bench.compare import THRESHOLD, compare, print_comparison
from bench.records import Header, Run, Writer, folder, load
from bench.report import print_run
from bench.runner import Plan, Runner
from expface_kernels.checks import LARGEST_TENSOR
from expface_kernels.commands import byte_count, count
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.margin_spec import MARGINS
from expface_kernels.margins import TARGET_GRADIENTS

OUT = Path("out")
"""Where a run writes that was not told where: a folder of the current one, made when it is needed."""
RESULTS = Path(__file__).resolve().parent / "results"
TOY_NOTE = "A toy run: it shows that everything works and agrees. Timings at this size mean nothing."
KIND = ("margin", "scale", "target_gradient", "device", "dtype", "autocast")
SHAPE = ("rows", "classes", "features")
# Of --model, which measures nothing: everything else would be ignored.
MODELED = {"model", "json", "workspace_bytes", "margin", "scale", "target_gradient", "dtype", *SHAPE}


class Parser(argparse.ArgumentParser):
    """Says what is wrong, and which command's options count, in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message} (see {self.prog} --help)\n")


def single_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m bench",
        description="Seconds and memory of the loss head against its peers at one shape.",
        epilog=f"python -m bench COMMAND --help, with COMMAND one of {', '.join(COMMANDS)}; "
        "python -m bench --quick is python -m bench sweep --quick, which ends within 2 minutes.",
    )
    p.add_argument("--toy", action="store_true", help="a tiny case, few rounds: does everything work?")
    for name, letter in zip(SHAPE, "BCD", strict=True):
        p.add_argument(f"--{name}", type=count, metavar=letter)
    _add_kind(p)
    p.add_argument("--scale", type=float, help="s (default: 64)")
    p.add_argument("--device", choices=DEVICES, help="(default: cpu)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of embeddings and centers (default: float32)")
    p.add_argument("--autocast", choices=list(AUTOCASTS), help="around the forward (default: none)")
    p.add_argument("--rounds", type=int, help="in a run, each peer once in each (default: 9)")
    p.add_argument("--runs", type=int, help="of which the least disturbed is reported (default: 3)")
    _add_peers(p, list(peers.PEERS))
    p.add_argument("--workspace-bytes", type=byte_count, help='of the peer "ours" (default: 256 MiB)')
    p.add_argument(
        "--memory-classes",
        type=count,
        nargs="+",
        metavar="C",
        help=f"class counts at which memory is measured with B={plans.MEMORY.rows}, "
        f"D={plans.MEMORY.features} (default: {' '.join(map(str, plans.MEMORY_CLASSES))})",
    )
    p.add_argument("--no-memory", action="store_true", help="measure seconds only")
    p.add_argument("--spin", action="store_true", help="time while another process keeps a core busy")
    p.add_argument(
        "--keep-memory",
        action="store_true",
        help="start again with a malloc that keeps what is freed, as suits heads that allocate in every step",
    )
    p.add_argument("--model", metavar="GPU", help="count a step's cost on h100, a100, …; run nothing")
    _add_json(p, f"{OUT}/bench.jsonl, {OUT}/bench-toy.jsonl; of --model: nowhere")
    return p


def sweep_parser(gpu: bool = False) -> argparse.ArgumentParser:
    if gpu:
        what = "B in 256, 1024, 4096 by C in 100k, 1M, 4M at D=512, bfloat16 autocast, on this GPU."
        p = Parser(prog="python -m bench gpu", description=what)
    else:
        p = Parser(prog="python -m bench sweep", description="Seconds and memory against C, B, D, workspace.")
        size = p.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_true", help="small shapes, nothing compiled: 2 minutes")
        size.add_argument("--toy", action="store_true", help="tiny shapes: does everything work and agree?")
        for name, letter in zip(SHAPE, "BCD", strict=True):
            p.add_argument(f"--{name}", type=count, nargs="+", metavar=letter, help=f"values of {letter}")
        _add_kind(p)
        p.add_argument("--forward-only", action="store_true", help="no backward at all (default: both)")
    _add_peers(p, plans.GPU_PEERS if gpu else plans.CPU_PEERS)
    p.add_argument("--rounds", type=int, help="at most, of each shape")
    p.add_argument("--seconds", type=float, help="the time that all may take; fewer rounds and peers keep it")
    _add_json(p, "bench/results/gpu-CARD.jsonl" if gpu else f"{OUT}/bench-sweep.jsonl, …-quick, …-toy")
    p.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help=f"draw PNGs there, where matplotlib is (default: {OUT}/bench-{'gpu' if gpu else 'sweep'})",
    )
    return p


def _add_kind(p: argparse.ArgumentParser) -> None:
    p.add_argument("--margin", choices=MARGINS, help="at its default strength (default: expface)")
    p.add_argument("--target-gradient", choices=TARGET_GRADIENTS, help="of every peer (default: exact)")


def _add_peers(p: argparse.ArgumentParser, default: Sequence[str]) -> None:
    p.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        help=f"of {', '.join(peers.names())}, ours@BYTES (workspace), package.module:ATTRIBUTE "
        f"(default: {' '.join(default)})",
    )


def _add_json(p: argparse.ArgumentParser, default: str) -> None:
    p.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help=f"write the records there, as JSON lines, while they are made (default: {default})",
    )


def single(argv: Sequence[str]) -> int:
    """Measure one case, or count it (`--model`)."""
    options = single_parser().parse_args(argv)
    if options.model is not None:
        return _model(options, argv)
    if options.keep_memory and not measure.keeps_memory():
        if (reason := measure.cannot_keep_memory()) is not None:
            raise ValueError(f"keep-memory: {reason}")
        # malloc reads its settings when a process starts.
        command = [sys.executable, "-m", "bench", *argv]
        return subprocess.call(command, env=os.environ | measure.KEEP_MEMORY)
    if options.device == "cuda" and (reason := machine.gpu_unavailable()):
        raise ValueError(f"device: {reason}")
    toy = options.toy
    case = _changed(plans.TOY if toy else DEFAULT, options, (*SHAPE, *KIND))
    _check_shape(case)
    names = _peers(options, list(peers.PEERS), [case])
    # In a toy run, compiling again in another process would take too long.
    weighed = tuple(n for n in names if not (options.no_memory or (toy and peers.get(n).compiles)))
    plan = plans.single(
        case,
        names,
        weighed,
        _memory_cases(options),
        rounds=int(_at_least("rounds", options.rounds, 1, 3 if toy else 9)),
        runs=int(_at_least("runs", options.runs, 1, 1 if toy else 3)),
        spin=options.spin,
    )
    settings = {"spin": options.spin, "keep_memory": options.keep_memory}
    code = _measure(plan, argv, "bench-toy" if toy else "bench", options.json, settings)
    if toy:
        print(TOY_NOTE)
    return code


def _memory_cases(options: argparse.Namespace) -> list[Case]:
    """Make the cases of memory alone. The default ones may be too large here: then their records say so."""
    asked = options.memory_classes
    classes = (() if options.toy else plans.MEMORY_CLASSES) if asked is None else asked
    cases = [dataclasses.replace(_changed(plans.MEMORY, options, KIND), classes=c) for c in classes]
    for case in cases if asked is not None else ():
        _check_shape(case)
    return cases


def _model(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from bench import model  # needs Triton, which not every system has

    for name, value in vars(options).items():
        if name not in MODELED and value != single_parser().get_default(name):
            raise ValueError(f"{name.replace('_', '-')}: --model counts a step and measures nothing")
    case = _changed(dataclasses.replace(DEFAULT, dtype="bfloat16"), options, (*SHAPE, *KIND))
    if max(case.rows, case.features) * case.classes > LARGEST_TENSOR:
        raise ValueError(f"classes: expected at most 2**59 logits and weights, got C = {case.classes:,}")
    workspace = DEFAULT_WORKSPACE_BYTES if options.workspace_bytes is None else options.workspace_bytes
    rows, report = model.model(case, options.model, workspace)
    header = Header.now(_command(argv), machine.describe(), gpu=options.model, workspace_bytes=workspace)
    writer = Writer(options.json, header)
    writer.add(*rows)
    writer.end()
    print(report)
    return 0


def sweep(argv: Sequence[str]) -> int:
    """Measure seconds and memory against classes, rows, features and workspace on the CPU."""
    options = sweep_parser().parse_args(argv)
    base = plans.TOY_SWEEP if options.toy else plans.QUICK if options.quick else plans.FULL
    changes = {n: getattr(options, n) for n in ("margin", "target_gradient") if getattr(options, n)}
    base = dataclasses.replace(
        base,
        many=dataclasses.replace(base.many, **changes),
        main=dataclasses.replace(base.main, **changes),
        directions=(False,) if options.forward_only else base.directions,
    )
    rows, classes, features = (tuple(getattr(options, name) or ()) for name in SHAPE)
    if rows or classes or features:  # only the lines that were asked for
        base = dataclasses.replace(base, rows=rows, classes=classes, features=features)
        for case in base.cases():
            _check_shape(case)
    base = _changed_sweep(base, options)
    stem = "bench-sweep" + "-quick" * options.quick + "-toy" * options.toy
    return _run_sweep(base.plan(), ["sweep", *argv], options, stem)


def gpu(argv: Sequence[str]) -> int:
    """Measure rows by classes on this machine's GPU."""
    options = sweep_parser(gpu=True).parse_args(argv)
    if (reason := machine.gpu_unavailable()) is not None:
        raise ValueError(reason)
    base = _changed_sweep(plans.GPU, options)
    card = re.sub("[^a-z0-9]+", "-", machine.describe_gpu()["card"].lower()).strip("-")
    options.json = options.json or RESULTS / f"gpu-{card}.jsonl"
    return _run_sweep(plans.gpu_plan(base), ["gpu", *argv], options, "bench-gpu")


def _changed_sweep(base: plans.Sweep, options: argparse.Namespace) -> plans.Sweep:
    return dataclasses.replace(
        base,
        rounds=int(_at_least("rounds", options.rounds, 1, base.rounds)),
        seconds=_at_least("seconds", options.seconds, 1, base.seconds),
        peers=_peers(options, base.peers, base.cases()),
    )


def _run_sweep(plan: Plan, argv: Sequence[str], options: argparse.Namespace, stem: str) -> int:
    """Measure, then draw what can be drawn into the folder that was asked for, or one in OUT."""
    reason = plots.unavailable()
    if options.plots is not None and reason is not None:
        raise ValueError(f"plots: {reason}")
    pictures = None
    if reason is None:
        pictures = folder("plots", options.plots or folder("plots", OUT) / stem)
    else:
        print(f"no pictures: {reason}", file=sys.stderr)
    return _measure(plan, argv, stem, options.json, {"seconds": plan.seconds}, pictures)


def _measure(
    plan: Plan,
    argv: Sequence[str],
    stem: str,
    path: Path | None,
    settings: dict[str, object],
    pictures: Path | None = None,
) -> int:
    """Carry out a plan: write records to the path or into OUT, report, draw; return the exit code."""
    described = machine.describe(plan.shapes[0].case.device)
    path = path or folder("json", OUT) / f"{stem}.jsonl"
    writer = Writer(path, Header.now(_command(argv), described, **settings))
    try:
        run = Runner(plan, writer).run()
    except KeyboardInterrupt:
        run = writer.run
    print_run(run)
    print(f"wrote {path}")
    if pictures is not None:
        for picture in plots.draw(run, pictures):
            print(f"wrote {picture}")
    if not run.complete:
        print("It was stopped before its end: this is what there was.")
        return 130
    return 0 if run.ok else 1


def compare_files(argv: Sequence[str]) -> int:
    """Say what got worse; exit code 1 where something did."""
    p = Parser(prog="python -m bench compare", description="What got worse from one result file to another.")
    p.add_argument("before", type=Path, metavar="A.jsonl")
    p.add_argument("after", type=Path, metavar="B.jsonl")
    p.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"of a change, as a part (default: {THRESHOLD:g})"
    )
    options = p.parse_args(argv)
    threshold = _at_least("threshold", options.threshold, 0, THRESHOLD)
    comparison = compare(load(options.before), load(options.after), threshold)
    print_comparison(comparison)
    return 1 if comparison.regressions else 0


def draw(argv: Sequence[str]) -> int:
    """Draw the pictures of a sweep that was made before."""
    p = Parser(prog="python -m bench plots", description="Draw a sweep's PNGs.")
    p.add_argument("sweep", type=Path, metavar="SWEEP.jsonl")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    options = p.parse_args(argv)
    if (reason := plots.unavailable()) is not None:
        raise ValueError(reason)
    run: Run = load(options.sweep)
    for path in plots.draw(run, folder("folder", options.folder)):
        print(f"wrote {path}")
    return 0


def readme(argv: Sequence[str]) -> int:
    """Write the documents' numbers anew from bench/results; exit code 1 where `--check` finds others."""
    from bench import readme as documents

    p = Parser(prog="python -m bench readme", description="Write the documents' numbers from bench/results.")
    p.add_argument("--check", action="store_true", help="change nothing; exit code 1 where one differs")
    options = p.parse_args(argv)
    different = {path: text for path, text in documents.rendered().items() if text != path.read_text()}
    for path, text in different.items():
        if options.check:
            print(f"bench: {path.name} differs from bench/results: run `make readme-tables`", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path.name}")
    if not different:
        print("README and docs/benchmarks.md agree with bench/results")
    return 1 if different and options.check else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "sweep": sweep,
    "gpu": gpu,
    "compare": compare_files,
    "plots": draw,
    "readme": readme,
}


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "bench", *argv])


def _changed(case: Case, options: argparse.Namespace, names: Sequence[str]) -> Case:
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(case, **given)


def _peers(options: argparse.Namespace, default: Sequence[str], cases: Sequence[Case]) -> tuple[str, ...]:
    """Return the peers asked for, once each; ValueError for an unknown one, or where none can run."""
    workspace = getattr(options, "workspace_bytes", None)
    ours = "ours" if workspace is None else f"ours@{workspace}"
    asked = default if options.peers is None else options.peers
    names = tuple(dict.fromkeys(ours if name == "ours" else name for name in asked))
    found = [peers.get(name) for name in names]
    reasons = [peer.why_not(peers.supported_case(peer, cases[0])) for peer in found]
    if all(reasons):
        raise ValueError(f"none of the peers can run: {reasons[0]}")
    return names


def _check_shape(case: Case) -> None:
    """Raise ValueError where there is no other class, or no room even for inputs and gradients."""
    if case.classes < 2:
        raise ValueError(
            f"classes: expected at least 2, got {case.classes}: a row needs a class to be told from"
        )
    need, free = 2 * case.input_bytes, machine.available_bytes(case.device)
    if free is not None and need > free:
        raise ValueError(
            f"B={case.rows}, C={case.classes}, D={case.features} does not fit: inputs and gradients take "
            f"{need / 1e9:.4g} GB, {free / 1e9:.3g} GB are free"
        )


def _at_least(name: str, value: float | None, least: int, default: float) -> float:
    """Return the value or the default; ValueError below the least, for NaN and infinity too."""
    if value is None:
        return default
    if not least <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least {least}, got {value:g}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; without one, the quick sweep or a single case."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        if argv and not argv[0].startswith("-"):
            raise ValueError(f"expected one of the commands {', '.join(COMMANDS)}, got {argv[0]!r}")
        return sweep(argv) if "--quick" in argv else single(argv)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
