"""Measures what sampling classes saves: drawing a sample, and a step over it, on the CPU backend.

    python -m bench.partial_fc                       # C = 10M for drawing, 1M for a step; a minute or two
    python -m bench.partial_fc --toy --json out.jsonl

Candidates take turns round by round; medians are compared. A sampled step that is wrong is not timed.
B rows · C classes · D features · S classes of a sample; seconds and bytes throughout
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from bench import machine
from bench.cases import Case
from bench.measure import WARM_UPS, no_garbage_collection, round_order
from bench.memory import output_of_child, resident_growth, unavailable
from bench.records import BYTES, SECONDS, Header, Measurement, Run, Writer, folder
from bench.report import print_run
from expface_kernels import MarginSoftmaxHead, reference
from expface_kernels.distributed.sampling import Sampler
from expface_kernels.testing import relative_error
from expface_kernels.testing.policy import CAPS

DEFAULT_JSON = Path("out") / "partial-fc.jsonl"
DRAW, KEYS = "draw", "torch.rand(C).topk(S)"
STEP, ALL = "sampled step", "step over all classes"
STEP_SGD, ALL_SGD = "sampled step with SGD", "step over all classes with SGD"
COMPARED = {DRAW: (KEYS, 1 / 20), STEP: (ALL, 0.16), STEP_SGD: (ALL_SGD, 0.16)}
"""What each is held against, and the share of its time that is wanted at most."""
Seconds = list[float]


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of drawing and of a step."""

    rows: int = 64
    draw_classes: int = 10_000_000
    draw_rate: float = 0.01
    step_classes: int = 1_000_000
    step_rate: float = 0.1
    features: int = 256

    @property
    def sample(self) -> int:
        """Drawing takes so many classes, S."""
        return int(self.draw_rate * self.draw_classes)


TOY = Sizes(rows=8, draw_classes=100_000, step_classes=4_000, features=16)


def take_turns(candidates: Sequence[Callable[[], Seconds]], rounds: int) -> list[list[Seconds]]:
    """Run all candidates in each round; return [candidate][clock][round], of the clocks that each reads."""
    for _ in range(WARM_UPS):
        for candidate in candidates:
            candidate()
    found: list[list[Seconds]] = [[] for _ in candidates]
    with no_garbage_collection():
        for round_ in range(rounds):
            for name in round_order([str(i) for i in range(len(candidates))], round_):
                found[int(name)].append(candidates[int(name)]())
    return [[list(clock) for clock in zip(*rows, strict=True)] for rows in found]


def time_draws(sizes: Sizes, rounds: int) -> tuple[Seconds, Seconds]:
    """Time a sample of S of C classes, all targets in it; and S random classes of C, by the largest keys."""
    targets = torch.randint(sizes.draw_classes, (sizes.rows,))
    steps = iter(range(10**9))

    def ours() -> Seconds:
        start = time.perf_counter()
        Sampler(sizes.draw_rate, 0, next(steps), 0)(targets, sizes.draw_classes)
        return [time.perf_counter() - start]

    def keys() -> Seconds:
        start = time.perf_counter()
        torch.rand(sizes.draw_classes).topk(sizes.sample)
        return [time.perf_counter() - start]

    (drawn,), (sorted_,) = take_turns([ours, keys], rounds)
    return drawn, sorted_


def time_steps(sizes: Sizes, rounds: int) -> dict[str, Seconds]:
    """Time forward and backward over a sample and over all classes, without and with the step of an SGD."""
    head = MarginSoftmaxHead(sizes.features, sizes.step_classes)
    x = torch.randn(sizes.rows, sizes.features, requires_grad=True)
    labels = torch.randint(sizes.step_classes, (sizes.rows,))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)

    def step(rate: float) -> Callable[[], Seconds]:
        def run() -> Seconds:
            head.sample_rate, head.sparse_grad = rate, rate < 1
            start = time.perf_counter()
            x.grad = None
            optimizer.zero_grad()
            loss = head(x, labels)
            assert isinstance(loss, Tensor)
            loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            return [middle - start, time.perf_counter() - start]

        return run

    sampled, whole = take_turns([step(sizes.step_rate), step(1.0)], rounds)
    return {STEP: sampled[0], ALL: whole[0], STEP_SGD: sampled[1], ALL_SGD: whole[1]}


def draw_bytes(classes: int, size: int, rows: int) -> int | None:
    """Measure the peak memory of drawing S of C classes in its own process; None where it cannot be read."""
    if unavailable():
        return None
    code = f"from bench.partial_fc import print_draw_bytes as p; p({classes}, {size}, {rows})"
    return int(output_of_child(["-c", code]))


def print_draw_bytes(classes: int, size: int, rows: int) -> None:
    """Print what `bench.memory` reads: the kernel's high-water mark, less what was there before."""
    torch.set_num_threads(1)
    targets = torch.randint(classes, (rows,))
    Sampler(0.5, 0, 0, 0)(torch.zeros(1, dtype=torch.int64), 64)
    print(resident_growth(lambda: Sampler(size / classes, 0, 0, 0)(targets, classes)))


def wrong(sizes: Sizes) -> str | None:
    """Say how far a sampled step is off float64 truth, and is not to be timed; None where it is right."""
    classes = min(sizes.step_classes, 2000)
    head = MarginSoftmaxHead(sizes.features, classes, sample_rate=sizes.step_rate, sparse_grad=True)
    x = torch.randn(sizes.rows, sizes.features, requires_grad=True)
    labels = torch.randint(classes, (sizes.rows,))
    loss = head(x, labels)
    assert isinstance(loss, Tensor)
    loss.backward()
    x64, w64 = (leaf.detach().double().requires_grad_() for leaf in (x, head.weight))
    truth = reference.margin_cross_entropy(
        x64,
        w64,
        labels,
        class_subset=Sampler(sizes.step_rate, 0, 0, 0)(labels, classes),
        target_gradient="detached",
    )
    assert isinstance(truth, Tensor)
    truth.backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    pairs = {"loss": (loss, truth), "dx": (x.grad, x64.grad), "dw": (head.weight.grad.to_dense(), w64.grad)}
    for name, (found, right) in pairs.items():
        assert right is not None
        error = relative_error(found, right)
        if not error <= CAPS[torch.float32]:
            return f"{name} is off by {error:.1e}"
    return None


def records(
    sizes: Sizes, draws: tuple[Seconds, Seconds], steps: dict[str, Seconds], peaks: dict[int, int | None]
) -> list[Measurement]:
    """Make the records of everything that was measured; `peaks` are bytes by classes."""

    def case(classes: int, rate: float, features: int = 1) -> Case:
        detached = "detached"  # the head's own target gradient
        return Case(sizes.rows, classes, features, target_gradient=detached, sample_rate=rate)

    drawn = case(sizes.draw_classes, sizes.draw_rate)
    found = [
        Measurement(SECONDS, name, name, drawn, tuple(seconds))
        for name, seconds in zip((DRAW, KEYS), draws, strict=True)
    ]
    for name, seconds in steps.items():
        rate = sizes.step_rate if name in (STEP, STEP_SGD) else 1.0
        own = case(sizes.step_classes, rate, sizes.features)
        found.append(Measurement(SECONDS, name, name, own, tuple(seconds)))
    return found + [
        Measurement(BYTES, DRAW, DRAW, case(classes, sizes.sample / classes), (peak,))
        for classes, peak in peaks.items()
        if peak is not None
    ]


def ratios(run: Run) -> dict[str, float]:
    """Divide the median of each sampled candidate by that of what it is held against."""
    medians = {m.peer: m.value for m in run.measurements if m.what == SECONDS and m.value is not None}
    return {name: medians[name] / medians[against] for name, (against, _) in COMPARED.items()}


def print_result(run: Run) -> None:
    """Print the records, and each share beside the one that is wanted."""
    print_run(run)
    for name, share in ratios(run).items():
        against, wanted = COMPARED[name]
        print(f"{name}: {share:.4f} of the seconds of {against}, wanted: under {wanted:g}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench.partial_fc: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where a sampled step is wrong; 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="python -m bench.partial_fc", description="What sampling classes saves.")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does everything work?")
    parser.add_argument("--rounds", type=int, default=9, help="each candidate once in each (default: 9)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"write the records there (default: {DEFAULT_JSON})"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    sizes, path = TOY if options.toy else Sizes(), options.json
    reason = wrong(sizes)
    if reason is not None:
        print(f"bench.partial_fc: nothing timed, a sampled step is wrong: {reason}", file=sys.stderr)
        return 1
    try:
        command = shlex.join(["python", "-m", "bench.partial_fc", *argv])
        header = Header.now(command, machine.describe(), toy=options.toy)
        path = path or folder("--json", DEFAULT_JSON.parent) / DEFAULT_JSON.name
        writer = Writer(path, header, "--json")
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    draws, steps = time_draws(sizes, options.rounds), time_steps(sizes, options.rounds)
    peaks = {
        c: draw_bytes(c, sizes.sample, sizes.rows) for c in (sizes.draw_classes, 10 * sizes.draw_classes)
    }
    writer.add(*records(sizes, draws, steps, peaks))
    print_result(writer.end())
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
