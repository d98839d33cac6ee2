"""`info`: versions, backends with their reasons, vector code, threads, OpenMP runtimes, GPUs."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expface_kernels import machine
from expface_kernels.commands import add_json, console, gigabytes, write_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("info", help="what this machine has, and which backends can run on it")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Exit code 0."""
    found = machine.describe()
    write_json(options.json, found)
    _print(found, console())
    return 0


def _print(found: dict[str, Any], out: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, value in _lines(found):
        grid.add_row(name, escape(value))
    out.print(grid)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    versions, cpu, threads = found["versions"], found["cpu"], found["threads"]
    memory = "memory unknown" if cpu["memory_bytes"] is None else gigabytes(cpu["memory_bytes"])
    lines = [(name, version or "not installed") for name, version in versions.items()]
    lines += [("system", found["system"])]
    lines += [(f"backend {name}", state) for name, state in found["backends"].items()]
    lines += [("cpu", f"{cpu['model']}, {cpu['cores']} cores, {memory}")]
    lines += [("float32 products", cpu["products"])]
    if "instruction_set" in cpu:
        others = ", ".join(cpu["instruction_sets"])
        lines += [("vector code", f"{cpu['instruction_set']} (this machine can run: {others})")]
        lines += [("kernels' threads", f"of {cpu['thread_runtime']}")]
    limit = threads["OMP_NUM_THREADS"]
    lines += [("torch threads", f"{threads['torch']}" + (f" (OMP_NUM_THREADS={limit})" if limit else ""))]
    lines += [("waiting threads", _waiting(threads["OMP_WAIT_POLICY"]))]
    lines += [("OpenMP runtimes", _openmp(found["openmp_runtimes"]))]
    lines += [
        (f"gpu {i}", f"{gpu['name']}, {gigabytes(gpu['memory_bytes'])}, compute {gpu['compute_capability']}")
        for i, gpu in enumerate(found["gpus"])
    ]
    return lines if found["gpus"] else [*lines, ("gpu", "none that torch sees")]


def _waiting(policy: str | None) -> str:
    """What OpenMP's threads do between two parallel loops, and what to set where other programs run too."""
    if (policy or "").lower() == "passive":
        return "sleep (OMP_WAIT_POLICY=passive)"
    told = f"OMP_WAIT_POLICY={policy}" if policy else "OMP_WAIT_POLICY is not set"
    return f"may spin ({told}); on a busy machine set OMP_WAIT_POLICY=passive before Python starts"


def _openmp(paths: list[str] | None) -> str:
    if paths is None:
        return "cannot be told on this system"
    if not paths:
        return "none"
    return "\n".join(paths) + (
        "" if len(paths) == 1 else f"\n{len(paths)} at once: they may fight for the cores"
    )
