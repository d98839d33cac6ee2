"""`plan`: memory of a rank item by item, seconds of a step, the fewest devices, what to change first."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from expface_kernels import machine
from expface_kernels.checks import DTYPES
from expface_kernels.commands import add_json, byte_count, console, count, gigabytes, table, write_json
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.plan import DEVICES, OPTIMIZERS, Advice, Job, Plan, Rates, advise, calibrate, plan
from expface_kernels.plan.job import AUTOCASTS
from expface_kernels.plan.memory import gpu_of, tiles_of

SCHEMA = 1


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory of a rank and seconds of a step, and the fewest devices that fit (a power of two)",
        description="What a loss head will take: counted and modelled, not run. Numbers may be written "
        "1e6 or 1M, bytes 8GB or 256MiB. Exit code 0 where the job fits, 1 where it does not, 2: bad input.",
    )
    parser.add_argument("--classes", type=count, required=True, metavar="C", help="of all ranks together")
    parser.add_argument("--features", type=count, default=512, metavar="D", help="(default: 512)")
    parser.add_argument(
        "--batch", type=count, default=256, metavar="B", help="rows of each rank (default: 256)"
    )
    parser.add_argument("--ranks", type=count, default=1, help="devices; on the CPU, machines (default: 1)")
    parser.add_argument("--device", choices=list(DEVICES), default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32",
                        help="of the centres (default: float32)")  # fmt: skip
    parser.add_argument(
        "--autocast", choices=AUTOCASTS, help="of the forward; embeddings then have its dtype"
    )
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="momentum",
                        help="(default: momentum)")  # fmt: skip
    parser.add_argument("--weight-decay", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--fused", action="store_true", help="the optimizer is made with fused=True")
    parser.add_argument("--sample-rate", type=float, default=1.0,
                        help="share of the classes in a step (default: 1)")  # fmt: skip
    parser.add_argument("--sparse-grad", action="store_true", help="the head is made with sparse_grad=True")
    parser.add_argument("--workspace-bytes", type=byte_count, metavar="BYTES",
                        default=DEFAULT_WORKSPACE_BYTES,
                        help="what the forward may keep (default: 256MiB)")  # fmt: skip
    parser.add_argument("--memory-bytes", type=byte_count, metavar="BYTES",
                        help="of a device (default: its own; for cpu what is free here)")  # fmt: skip
    parser.add_argument("--reserved-bytes", type=byte_count, default=0, metavar="BYTES",
                        help="of it, for the backbone and all else (default: 0)")  # fmt: skip
    parser.add_argument("--gflops", type=float, help="of the CPU; with --gbytes nothing is measured")
    parser.add_argument("--gbytes", type=float, help="a second, of the CPU's memory")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Exit code 0 where the job fits, else 1; ValueError for one that cannot be."""
    fields = {field.name for field in dataclasses.fields(Job)}
    job = Job(**{name: value for name, value in vars(options).items() if name in fields})
    if job.memory_bytes is None:  # once: what is free changes while we look
        job = dataclasses.replace(job, memory_bytes=DEVICES[job.device].memory())
    rates = _rates(job, options.gflops, options.gbytes)
    found = plan(job, rates)
    advice = advise(found, rates)
    write_json(options.json, to_dict(found, advice, rates))
    print_plan(found, advice, rates, options.gflops is not None, console())
    return 0 if found.fits else 1


def _rates(job: Job, gflops: float | None, gbytes: float | None) -> Rates | None:
    """As given, else measured here; None for a GPU."""
    if (gflops is None) != (gbytes is None) or (gflops is not None and job.device != "cpu"):
        raise ValueError("gflops, gbytes: expected both or neither, and only for the device cpu")
    if job.device != "cpu":
        return None
    if gflops is None or gbytes is None:
        return calibrate(job.rows, job.features, tiles_of(job)[1], torch.get_num_threads())
    for name, value in (("gflops", gflops), ("gbytes", gbytes)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return Rates(gflops * 1e9, gbytes * 1e9, gbytes * 1e9)


def to_dict(found: Plan, advice: Advice, rates: Rates | None) -> dict[str, Any]:
    """Plain values for JSON; bytes and seconds."""
    return {
        "schema": SCHEMA,
        "job": dataclasses.asdict(found.job),
        "items": [dataclasses.asdict(item) for item in found.items],
        "peak_bytes": found.peak,
        "capacity_bytes": found.job.capacity_bytes,
        "fits": found.fits,
        "work": [dataclasses.asdict(work) for work in found.work],
        "seconds": found.seconds,
        "cpu_rates": None if rates is None else dataclasses.asdict(rates),
        "smallest_ranks": advice.smallest_ranks,
        "first": advice.first,
        "changes": [
            {"name": c.name, "peak_bytes": c.plan.peak, "seconds": c.plan.seconds, "fits": c.plan.fits}
            for c in advice.changes
        ],
    }


def print_plan(found: Plan, advice: Advice, rates: Rates | None, given: bool, out: Console) -> None:
    """given: whether the rates are the user's own."""
    job = found.job
    out.print(escape(job.describe()), soft_wrap=True)
    out.print(_memory(found))
    out.print(_work(found))
    out.print(escape(_speeds(job, rates, given)), soft_wrap=True)
    out.print(_changes(found, advice))
    fits = "fits" if found.fits else "does not fit"
    out.print(
        f"{gigabytes(found.peak)} of {gigabytes(job.capacity_bytes)} that can be used: it {fits}. The fewest "
        f"devices: {advice.smallest_ranks or 'no number fits'}."
    )
    out.print(f"To change first: {advice.first}.", soft_wrap=True)


def _speeds(job: Job, rates: Rates | None, given: bool) -> str:
    """Which backend's work the milliseconds are, at which rates, and where those come from."""
    if rates is None:
        gpu = gpu_of(job.device)
        return (
            "A roofline over the triton backend's launches and the optimizer's operators, at rates taken to "
            f"be in reach of {DEVICES[job.device].title}, not measured here: {gpu.half:g} TFLOP/s in 16 bit, "
            f"{gpu.tf32:g} in tf32, {gpu.float32:g} in float32, {gpu.bandwidth:g} TB/s of memory."
        )
    here = f"as measured on this {machine.cpu_model()}, {torch.get_num_threads()} threads"
    return (
        f"The cpu backend at {rates.flops / 1e9:.3g} GFLOP/s of products and "
        f"{rates.bandwidth / 1e9:.3g} GB/s of memory, {rates.fresh / 1e9:.3g} where it is fresh: "
        f"{'as given' if given else here}."
    )


def _memory(found: Plan) -> Any:
    shown = table("memory of a rank", "MB", "when", "how")
    shown.columns[2].justify = shown.columns[3].justify = "left"
    for item in found.items:
        shown.add_row(item.name, f"{item.bytes / 1e6:,.1f}", item.when, item.how)
    shown.add_section()
    shown.add_row("peak", f"{found.peak / 1e6:,.1f}", "", "always, and the larger of backward and update")
    return shown


def _work(found: Plan) -> Any:
    shown = table("work of a step", "GFLOP", "MB", "ms")
    for work in found.work:
        shown.add_row(
            work.name, f"{work.flops / 1e9:,.1f}", f"{work.bytes / 1e6:,.1f}", f"{1e3 * work.seconds:,.2f}"
        )
    shown.add_section()
    moved = sum(work.bytes for work in found.work)
    shown.add_row("step", f"{found.flops / 1e9:,.1f}", f"{moved / 1e6:,.1f}", f"{1e3 * found.seconds:,.2f}")
    return shown


def _changes(found: Plan, advice: Advice) -> Any:
    shown = table("with one change", "MB", "ms", "fits")
    for name, one in [("as it is", found), *((change.name, change.plan) for change in advice.changes)]:
        fits = "yes" if one.fits else "no"
        shown.add_row(escape(name), f"{one.peak / 1e6:,.1f}", f"{1e3 * one.seconds:,.2f}", fits)
    return shown
