"""`gradcheck`: loss and gradients of a margin on a backend, judged by `expface_kernels.testing`."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from expface_kernels import backends, machine
from expface_kernels.backends import triton
from expface_kernels.checks import DTYPES
from expface_kernels.commands import (
    add_json,
    byte_count,
    console,
    count,
    gigabytes,
    table,
    whole,
    write_json,
)
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.margin_spec import margin_argument
from expface_kernels.margins import TARGET_GRADIENTS, MarginFunction, target_similarity
from expface_kernels.testing import KINDS, GradientReport, Quantity, check_gradients
from expface_kernels.testing.gradients import DEFAULT_KINDS

SCHEMA = 1
# Float64 copies of (B, C) and of (C, D) that truth, eager head and differences hold at most, as measured.
LOGIT_COPIES, CENTRE_COPIES = 10, 19


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "gradcheck",
        help="judge loss and gradients against float64, beside what eager PyTorch makes",
        description="Judge loss, dx and dw against float64, beside same-dtype eager PyTorch; the worst rows; "
        "the gradient against finite differences. Exit code 0: the policy holds, 1: it fails, 2: bad input.",
    )
    parser.add_argument(
        "--margin", type=margin_argument, default="expface",
        help="expface (the default), arcface:0.5, arcface:m=0.5,boundary=easy, … or your own module:Class",
    )  # fmt: skip
    parser.add_argument("--backend", default="auto", metavar="NAME",
                        help=f"auto (the default), {', '.join(backends.available())}")  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32",
                        help="of rows and centres (default: float32)")  # fmt: skip
    parser.add_argument(
        "--target-gradient", choices=TARGET_GRADIENTS, default="exact", help="(default: exact)"
    )
    parser.add_argument("--rows", type=count, default=32, metavar="B", help="(default: 32)")
    parser.add_argument("--classes", type=count, default=1031, metavar="C", help="(default: 1031)")
    parser.add_argument("--features", type=count, default=256, metavar="D", help="at least 2 (default: 256)")
    parser.add_argument("--scale", type=float, default=64.0, metavar="S", help="(default: 64)")
    parser.add_argument("--seed", type=whole, default=0, help="of the batches (default: 0)")
    parser.add_argument("--batches", nargs="+", choices=KINDS, default=DEFAULT_KINDS, metavar="KIND",
                        help=f"of {', '.join(KINDS)} (default: {' '.join(DEFAULT_KINDS)})")  # fmt: skip
    parser.add_argument("--workspace-bytes", type=byte_count, metavar="BYTES",
                        default=DEFAULT_WORKSPACE_BYTES,
                        help="what the forward may keep; 0 recomputes (default: 256 MiB)")  # fmt: skip
    parser.add_argument("--device", help="where the backend computes (default: a GPU for triton, else cpu)")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Exit code 0 where the policy holds, else 1; ValueError for what cannot be checked."""
    dtype = DTYPES[options.dtype]
    device = options.device or _default_device(options.backend)
    _check_serves(options.backend, dtype, device)
    _check_fits(options.rows, options.classes, options.features)
    _check_margin(options.margin, options.rows)
    report = check_gradients(
        options.margin,
        target_gradient=options.target_gradient,
        scale=options.scale,
        dtype=dtype,
        backend=options.backend,
        device=device,
        rows=options.rows,
        classes=options.classes,
        features=options.features,
        kinds=options.batches,
        seed=options.seed,
        workspace_bytes=options.workspace_bytes,
    )
    write_json(options.json, {"schema": SCHEMA, **report.to_dict(), "machine": machine.describe()})
    print_report(report, console())
    return 0 if report.passed else 1


def _default_device(backend: str) -> str:
    return "cuda" if backend == "triton" and not triton.interpreted() else "cpu"


def _check_serves(backend: str, dtype: torch.dtype, device: str) -> None:
    """ValueError with the backend's own reason."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if backend == "triton" and backends.available()["triton"] != "ok":
        raise ValueError(
            f"backend: triton cannot run here: {backends.available()['triton']}; with "
            "TRITON_INTERPRET=1 in the environment it runs on the CPU, in Triton's interpreter"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: torch sees no GPU here, got {device!r}")
    try:
        like = torch.empty((1, 1), dtype=dtype, device=device)
        backends.require_backend(backends.resolve(backend, like, like), like, like)
    except (RuntimeError, AssertionError) as error:  # torch refuses devices with either
        raise ValueError(" ".join(str(error).split())) from error


def _check_fits(rows: int, classes: int, features: int) -> None:
    need = 8 * classes * (LOGIT_COPIES * rows + CENTRE_COPIES * features)
    free = machine.available_bytes()
    if free is not None and need > free:
        raise ValueError(
            f"B={rows}, C={classes}, D={features} does not fit: its float64 truth takes about "
            f"{gigabytes(need)}, {gigabytes(free)} are free"
        )


def _check_margin(margin: MarginFunction, rows: int) -> None:
    """ValueError for a margin that raises, or returns no psi."""
    theta = torch.linspace(0.0, math.pi, rows, dtype=torch.float64, device="cpu")
    try:
        target_similarity(margin, theta, "exact")
    except Exception as error:  # a user's own code may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"margin: {margin!r} of {rows} angles raised {text}") from error


def print_report(report: GradientReport, out: Console) -> None:
    s = report.setting
    out.print(
        f"{escape(s['margin'])}, {s['target_gradient']} gradient, s={s['scale']:g}, {s['dtype']}, backend "
        f"{s['backend']} on {s['device']}, B={s['rows']:,}, C={s['classes']:,}, D={s['features']:,}, "
        f"seed {s['seed']}"
    )
    shown = table("batch", "what", "error", "eager's", "allowed", "row", "at", "", left=2)
    for one in report.batches:
        for i, quantity in enumerate(one.quantities):
            last = i == len(one.quantities) - 1
            shown.add_row(one.kind if i == 0 else "", *_cells(quantity), end_section=last)
    out.print(shown)
    out.print(
        "Errors are relative to the float64 truth's norm, the worst rows' to the row's own. Allowed are 3 "
        "times what eager PyTorch makes in this dtype, or 1e-6, and never more than the dtype's cap.",
        soft_wrap=True,
    )
    if s["eager_psi"] != s["dtype"]:
        out.print(
            f"The margin takes no {s['dtype']} angles: eager's psi is computed in {s['eager_psi']}.",
            soft_wrap=True,
        )
    for line in report.failures():
        out.print(f"FAILED {escape(line)}", soft_wrap=True)
    if report.passed:
        out.print("The policy holds.")


def _cells(q: Quantity) -> tuple[str, ...]:
    return (
        q.name,
        f"{q.error:.1e}",
        "" if q.eager_error is None else f"{q.eager_error:.1e}",
        f"{q.limit:.1e}",
        "" if q.row is None else str(q.row),
        "" if q.angle is None else f"{math.degrees(q.angle):.3g}°",
        "ok" if q.passed else "FAILED",
    )
