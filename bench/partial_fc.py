"""What sampling classes saves: drawing a sample, and a step over it, on the CPU backend.

    python -m bench.partial_fc                       # C = 10M for drawing, 1M for a step; a minute or two
    python -m bench.partial_fc --toy --json out.json

Candidates take turns round by round; medians are compared. A sampled step that is wrong is not timed.
B rows · C classes · D features · S classes of a sample; seconds and bytes throughout
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench import machine
from bench.commands.options import OUT, file_to_write, in_out
from bench.measure import Spread, no_garbage_collection, turn
from bench.memory import resident_growth, unavailable
from expface_kernels import MarginSoftmaxHead, reference
from expface_kernels.distributed.sampling import Sampler
from tests.tolerances import CAPS, relative_error

SCHEMA = 1
JSON = "partial-fc.json"
DRAW_SHARE, STEP_SHARE = 1 / 20, 0.16
"""What drawing may cost of torch.rand(C).topk(S), and a step of one over all classes."""
WARM_UPS = 2
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Sizes:
    rows: int = 64
    draw_classes: int = 10_000_000
    draw_rate: float = 0.01
    step_classes: int = 1_000_000
    step_rate: float = 0.1
    features: int = 256

    @property
    def sample(self) -> int:
        """S of drawing."""
        return int(self.draw_rate * self.draw_classes)


TOY = Sizes(rows=8, draw_classes=100_000, step_classes=4_000, features=16)


def interleaved(candidates: dict[str, Callable[[], list[float]]], rounds: int) -> list[Seconds]:
    """Each candidate's seconds by round, once for every clock that it reads."""
    for _ in range(WARM_UPS):
        for candidate in candidates.values():
            clocks = len(candidate())
    found: list[Seconds] = [{name: [] for name in candidates} for _ in range(clocks)]
    with no_garbage_collection():
        for round_ in track(range(rounds), "rounds", transient=True, console=Console(stderr=True)):
            for name in turn(list(candidates), round_):
                for clock, seconds in zip(found, candidates[name](), strict=True):
                    clock[name].append(seconds)
    return found


def time_draws(sizes: Sizes, rounds: int) -> Seconds:
    """A sample of S classes of C, all targets in it; and S random classes of C, by the largest keys."""
    targets = torch.randint(sizes.draw_classes, (sizes.rows,))
    steps = iter(range(10**9))

    def ours() -> list[float]:
        start = time.perf_counter()
        Sampler(sizes.draw_rate, 0, next(steps), 0)(targets, sizes.draw_classes)
        return [time.perf_counter() - start]

    def keys() -> list[float]:
        start = time.perf_counter()
        torch.rand(sizes.draw_classes).topk(sizes.sample)
        return [time.perf_counter() - start]

    return interleaved({"sample": ours, "torch.rand(C).topk(S)": keys}, rounds)[0]


def time_steps(sizes: Sizes, rounds: int) -> tuple[Seconds, Seconds]:
    """Forward and backward over a sample and over all classes; and the same with the step of an SGD."""
    head = MarginSoftmaxHead(sizes.features, sizes.step_classes)
    x = torch.randn(sizes.rows, sizes.features, requires_grad=True)
    labels = torch.randint(sizes.step_classes, (sizes.rows,))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)

    def step(rate: float) -> Callable[[], list[float]]:
        def run() -> list[float]:
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

    both = {f"sample_rate={sizes.step_rate}, sparse_grad": step(sizes.step_rate), "all classes": step(1.0)}
    without, with_sgd = interleaved(both, rounds)
    return without, with_sgd


def draw_bytes(classes: int, size: int, rows: int) -> int | None:
    """Peak memory of drawing S of C classes, in a process of its own; None where it cannot be read."""
    if unavailable():
        return None
    code = f"from bench.partial_fc import print_draw_bytes as p; p({classes}, {size}, {rows})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


def print_draw_bytes(classes: int, size: int, rows: int) -> None:
    """As `bench.memory` reads it: the kernel's high-water mark, less what was there before."""
    torch.set_num_threads(1)
    targets = torch.randint(classes, (rows,))
    Sampler(0.5, 0, 0, 0)(torch.zeros(1, dtype=torch.int64), 64)
    print(resident_growth(lambda: Sampler(size / classes, 0, 0, 0)(targets, classes)))


def wrong(sizes: Sizes) -> str | None:
    """Why a sampled step is not to be timed: how far it is off float64 truth; None where right."""
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


def ratio(seconds: Seconds) -> float:
    """Median of the first candidate over that of the second."""
    first, second = (Spread.of(values).median for values in seconds.values())
    return first / second


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Everything, ready for JSON."""
    described = machine.describe()
    torch.manual_seed(0)
    draws = time_draws(sizes, rounds)
    steps, with_sgd = time_steps(sizes, rounds)
    larger = 10 * sizes.draw_classes
    peaks = {str(c): draw_bytes(c, sizes.sample, sizes.rows) for c in (sizes.draw_classes, larger)}
    return {
        "schema": SCHEMA,
        "sizes": dataclasses.asdict(sizes) | {"sample": sizes.sample},
        "rounds": rounds,
        "machine": described,
        "draw": {"seconds": draws, "ratio": ratio(draws), "wanted": DRAW_SHARE},
        "step": {"seconds": steps, "ratio": ratio(steps), "wanted": STEP_SHARE},
        "step with SGD": {"seconds": with_sgd, "ratio": ratio(with_sgd), "wanted": STEP_SHARE},
        "draw_bytes": peaks,
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    sizes, host = result["sizes"], result["machine"]
    console.print(
        f"{host['cpu']}, {host['cores']} cores, {host['torch_threads']} threads, torch {host['torch']}, "
        f"commit {host['commit']}, load {host['load_average']}"
    )
    titles = {
        "draw": f"Drawing S={sizes['sample']:,} of C={sizes['draw_classes']:,}",
        "step": "Forward and backward, B={rows}, C={step_classes:,}, D={features}".format(**sizes),
        "step with SGD": "The same and the optimizer's step",
    }
    for key, title in titles.items():
        found = result[key]
        table = Table("", "seconds", "quartiles", title=f"{title}; medians of {result['rounds']} rounds")
        for name, values in found["seconds"].items():
            spread = Spread.of(values)
            quartiles = f"{spread.first_quartile:.4f} to {spread.third_quartile:.4f}"
            table.add_row(name, f"{spread.median:.4f}", quartiles)
        console.print(table, f"ratio {found['ratio']:.4f}, wanted: under {found['wanted']:g}")
    for classes, peak in result["draw_bytes"].items():
        size = unavailable() if peak is None else f"{peak / 1e6:.1f} MB"
        console.print(f"drawing S={sizes['sample']:,} of C={int(classes):,}, peak memory: {size}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench.partial_fc: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a sampled step is wrong; 2 for bad input."""
    parser = _Parser(prog="python -m bench.partial_fc", description="What sampling classes saves.")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does everything work?")
    parser.add_argument("--rounds", type=int, default=9, help="each candidate once in each (default: 9)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write everything that was found there (default: {OUT / JSON})",
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    try:
        path = file_to_write("--json", options.json or in_out("--json", JSON))
    except ValueError as error:
        parser.error(str(error))
    sizes = TOY if options.toy else Sizes()
    reason = wrong(sizes)
    if reason is not None:
        print(f"bench.partial_fc: nothing timed, a sampled step is wrong: {reason}", file=sys.stderr)
        return 1
    result = measure(sizes, options.rounds)
    print_result(result, Console())
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
