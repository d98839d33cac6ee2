"""Measure tiles on the GPU at hand and rewrite the table of the best: `tuned.json`.

    python -m expface_kernels.workshop.autotune [--features 512 …] [--dtype bfloat16 …] [--list]

For each D and dtype, role by role: every candidate's log l, θ, dx and dw are held against those of the tiles
in use, then its kernel is timed inside a real forward and backward; the fastest right one goes into the
table. It is rewritten after every role, so what is stopped loses nothing. With `--seconds` a role looks at as
many candidates as its share allows, those most like the rules' own first. `--list` shows the candidates and
needs no GPU. A new table wants `audit` and the GPU tests again. Exit status 2 for bad input or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.triton import TritonBackend, calls, tuning
from expface_kernels.backends.triton.tuning import Blocks, Tile
from expface_kernels.commands import Parser, count
from expface_kernels.workshop.candidates import UNKNOWN_SHARED, Setting, candidates

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PRODUCTS = {
    "bfloat16": (BF16, BF16),
    "bfloat16-float32": (BF16, F32),  # a float32 master under autocast
    "float16": (F16, F16),
    "float16-float32": (F16, F32),
    "float32": (F32, F32),
}
"""What is multiplied, and how centres are stored."""
KERNELS = {
    "forward": "forward_tile",
    "forward_more": "forward_tile",
    "probability": "probability_tile",
    "weight": "weight_gradient_tile",
}
EVERYTHING = 2**62  # bytes of workspace: the forward then keeps every exponential
# Another tile adds up in another order: float32 sums move by a few roundings, a P' at the edge of two 16-bit
# numbers becomes the other one.
AGREEMENT = {F32: 1e-5, BF16: 2e-3, F16: 1e-3}
WARM_UPS, ROUNDS = 2, 5


class Clock(Protocol):
    """Adds up the seconds of launches."""

    def timed(self, arguments: dict[str, Any], run: Callable[[], None]) -> None:
        """Run, and count it."""

    def seconds(self) -> float:
        """Of everything since the last call."""


class EventClock:
    """CUDA events around each launch, on the current stream."""

    def __init__(self) -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, arguments: dict[str, Any], run: Callable[[], None]) -> None:
        # Once uncounted: while it runs, the counted one is queued, so the host's delay is not part of it.
        run()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        self.events.append((start, stop))

    def seconds(self) -> float:
        torch.cuda.synchronize()
        total = sum(start.elapsed_time(stop) for start, stop in self.events)
        self.events.clear()
        return total / 1e3


@dataclass(frozen=True)
class Machine:
    """Where tiles are measured; `shared` is the memory that a block may take, in bytes."""

    arch: str
    name: str
    device: str
    shared: int
    clock: Clock

    @classmethod
    def here(cls) -> Machine:
        properties = torch.cuda.get_device_properties(0)
        arch = tuning.architecture(torch.device("cuda", 0))
        shared = getattr(properties, "shared_memory_per_block_optin", UNKNOWN_SHARED)
        return cls(arch, properties.name, "cuda", shared, EventClock())


@dataclass(frozen=True)
class Step:
    """A forward and backward to measure in: x (B, D), w (C, D), y (B,) on the device."""

    setting: Setting
    x: Tensor
    w: Tensor
    y: Tensor

    @classmethod
    def of(cls, setting: Setting, rows: int, classes: int, device: str) -> Step:
        generator = torch.Generator(device).manual_seed(0)

        def normal(count: int) -> Tensor:
            return 0.01 * torch.randn(count, setting.features, generator=generator, device=device)

        w = normal(classes)
        y = torch.randint(classes, (rows,), generator=generator, device=device)
        # About 45° from its centre, where rows have a mass on their target and on the others.
        x = w[y] + normal(rows)
        return cls(setting, x.to(setting.stored), w.to(setting.stored), y)

    def configs(self, role: str) -> list[OpConfig]:
        """Plain sums. Of the role that has more: exponentials kept, in float16 the hardest negative; then
        maxima and the hardest, which take the most registers."""
        cast = self.setting.product if self.setting.product != self.setting.stored else None
        if role != "forward_more":
            return [OpConfig(64.0, True, 0, False, cast)]
        half = self.setting.product == F16
        return [OpConfig(64.0, True, EVERYTHING, half, cast), OpConfig(128.0, True, 0, True, cast)]

    def run(self, role: str, tiles: Blocks) -> tuple[Tensor, ...]:
        """(log l, θ, dx, dw) of each config."""
        return tuple(result for config in self.configs(role) for result in self._run(config, tiles))

    def _run(self, config: OpConfig, tiles: Blocks) -> tuple[Tensor, ...]:
        backend = TritonBackend()
        with tuning.trying(tiles):
            out = backend.forward(self.x, self.w, self.y, None, config)
            g = torch.full_like(out.log_l, 1 / self.x.shape[0])
            dx, dw = backend.backward(
                self.x, self.w, self.y, None, out.log_l, out.workspace, g, 0.5 * g, config, True, True
            )
        assert dx is not None
        assert dw is not None
        return out.log_l, out.theta, dx, dw


@contextlib.contextmanager
def timing(kernel: str, clock: Clock) -> Iterator[None]:
    """Inside, launches of that kernel go through the clock; the others are only made."""

    def made(jit: Any, programs: int, arguments: dict[str, Any]) -> None:
        def run() -> None:
            jit[(programs,)](**arguments)

        if jit.__name__ == kernel:
            clock.timed(arguments, run)
        else:
            run()

    with calls.watched(made):
        yield


def disagreement(got: Sequence[Tensor], wanted: Sequence[Tensor], limit: float) -> str | None:
    """The first of (log l, θ, dx, dw) that is off by more than `limit` of its norm; None where none is.

    There may be several four.
    """
    names = ("log l", "theta", "dx", "dw") * (len(wanted) // 4)
    for name, a, b in zip(names, got, wanted, strict=True):
        norm = torch.linalg.vector_norm(b.double())
        off = float(torch.linalg.vector_norm(a.double() - b.double()) / norm.clamp_min(1e-300))
        if not off <= limit:  # NaN is off too
            return f"{name} is off by {off:.2g} of its norm, at most {limit:g}"
    return None


def fastest(
    step: Step,
    role: str,
    tiles: Iterable[Tile],
    base: Blocks,
    clock: Clock,
    tell: Callable[[str], None],
    until: float = math.inf,
) -> Tile:
    """The fastest right tile of `tiles` and the one that `base` has, whose results all are held against.

    until: a time of time.monotonic(), after which those that are left are not looked at.
    """
    in_use: Tile = getattr(base, role)
    wanted = step.run(role, base)
    times: dict[Tile, float] = {}
    for tile in dict.fromkeys([in_use, *tiles]):
        if times and time.monotonic() > until:
            tell("  no time is left for the others")
            break
        chain = tuning.with_tiles(base, {role: tile})
        try:
            got = wanted if tile == in_use else step.run(role, chain)
            failure = disagreement(got, wanted, AGREEMENT[step.setting.product])
            if failure is None:
                times[tile] = _seconds(step, role, chain, clock)
        except Exception as error:  # more than the GPU has, or not to be compiled: no candidate
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        tell(f"  {tile}: {failure or f'{times[tile] * 1e3:.4g} ms'}")
    return min(times, key=lambda tile: times[tile], default=in_use)


def _seconds(step: Step, role: str, tiles: Blocks, clock: Clock) -> float:
    """Of the role's kernel in one step, the median of some."""
    samples = []
    for _ in range(WARM_UPS + ROUNDS):
        with timing(KERNELS[role], clock):
            step.run(role, tiles)
        samples.append(clock.seconds())
    return statistics.median(samples[WARM_UPS:])


def record(path: Path, setting: Setting, role: str, tile: Tile, measured_on: str) -> None:
    """Put one tile into the table at `path`, which is made where there is none; the rest of it stays."""
    table = json.loads(path.read_text()) if path.exists() else {}
    entry = table.setdefault(setting.arch, {"tiles": {}})
    entry["measured_on"] = measured_on
    key = tuning.key(setting.features, setting.product, setting.stored, setting.precision)
    entry["tiles"].setdefault(key, {})[role] = asdict(tile)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def measure(options: argparse.Namespace, machine: Machine, tell: Callable[[str], None]) -> None:
    """Every role of every setting that the options ask for, each with the best tiles found before it.

    Each has an even share of the seconds that are left.
    """
    end = time.monotonic() + options.seconds
    to_do = len(options.features) * len(options.dtype) * len(options.role)
    for name, setting in settings(machine.arch, options):
        step = Step.of(setting, options.rows, options.classes, machine.device)
        base = tuning.blocks(
            setting.arch, setting.features, setting.product, setting.stored, setting.precision
        )
        for role in options.role:
            left = end - time.monotonic()
            if left < 0:
                tell(f"over {options.seconds:g} seconds: the rest is not measured")
                return
            until = time.monotonic() + left / to_do
            to_do -= 1
            tell(f"{machine.arch}, D={setting.features}, {name}, {role}:")
            tiles = candidates(role, setting, machine.shared)
            tile = fastest(step, role, tiles, base, machine.clock, tell, until)
            base = tuning.with_tiles(base, {role: tile})
            record(options.output, setting, role, tile, f"{machine.name}, {versions()}")


def settings(arch: str, options: argparse.Namespace) -> list[tuple[str, Setting]]:
    """What the options ask for, by the dtypes' name, D by D."""
    precision = tuning.float32_precision(arch)
    return [
        (name, Setting(arch, d, *PRODUCTS[name], precision if name == "float32" else "ieee"))
        for d in options.features
        for name in options.dtype
    ]


def versions() -> str:
    """What else the times depend on."""
    import triton

    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"Triton {triton.__version__}, torch {torch.__version__}, {today}"


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m expface_kernels.workshop.autotune")
    p.add_argument("--features", nargs="+", type=count, default=[512], metavar="D")
    p.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "bfloat16-float32"], choices=list(PRODUCTS),
        help="of the product, and of the stored centres where it is another",
    )  # fmt: skip
    p.add_argument("--role", nargs="+", default=list(tuning.ROLES), choices=tuning.ROLES)
    p.add_argument("--rows", type=count, default=1024, metavar="B")
    p.add_argument("--classes", type=count, default=100_000, metavar="C")
    p.add_argument(
        "--seconds", type=float, default=math.inf, help="what all may take; each role has its share"
    )
    p.add_argument("--output", type=Path, default=tuning.TUNED, help="the table that is rewritten")
    p.add_argument("--list", "--dry-run", action="store_true", help="print the candidates, measure nothing")
    p.add_argument("--arch", default="sm_90", help="of --list")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.list:
        _list(options)
        return 0
    reason = TritonBackend().unavailable()
    if reason is None and not torch.cuda.is_available():
        reason = "there is no GPU, and the interpreter's times mean nothing"
    if reason is not None:
        parser().error(reason)
    measure(options, Machine.here(), lambda line: print(line, flush=True))
    print(f"{options.output} is rewritten; run audit and the GPU tests with it")
    return 0


def _list(options: argparse.Namespace) -> None:
    from expface_kernels.workshop.machine_code import LIMITS

    limit = LIMITS[options.arch].block_shared if options.arch in LIMITS else UNKNOWN_SHARED
    for name, setting in settings(options.arch, options):
        for role in options.role:
            print(f"{options.arch}, D={setting.features}, {name}, {role}:")
            for tile in candidates(role, setting, limit):
                print(f"  {tile}")


if __name__ == "__main__":
    sys.exit(main())
