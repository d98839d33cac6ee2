"""What the numbers were measured on: hardware, versions, commit."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expface_kernels
from bench import cuda
from expface_kernels import backends

_ROOT = Path(__file__).resolve().parents[1]


def _proc_field(path: str, field: str) -> str | None:
    """Value of the first "field: value" line of a file of /proc; None where there is none, as off Linux."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == field), None)


def proc_bytes(path: str, field: str) -> int | None:
    """A field that /proc gives in kB, in bytes."""
    value = _proc_field(path, field)
    return None if value is None else int(value.split()[0]) * 1024


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that can be had on the device, without swapping; None where it cannot be told (off Linux)."""
    if device == "cuda":
        return cuda.available_bytes() if cuda.unavailable() is None else None
    return proc_bytes("/proc/meminfo", "MemAvailable")


def cpu_model() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """Of the cpu backend's kernels; or why there are none."""
    state = backends.available()["cpu"]
    if state != "ok":
        return state
    name: str = importlib.import_module("expface_kernels._C").instruction_set()
    return name


def commit() -> str:
    """Short hash of the checkout, with "-dirty" where tracked files differ from it; else "unknown"."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def versions(*packages: str) -> dict[str, str | None]:
    """Of installed packages; None for one that is not."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything above, versions, processes that ran in the last minute, the GPU if that is what is measured.

    Memory in bytes.
    Called before anything is measured: a load then is somebody else's, and the numbers suffer from it.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": proc_bytes("/proc/meminfo", "MemTotal"),
        "instruction_set": instruction_set(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions("triton")["triton"],
        "numpy": np.__version__,
        "expface_kernels": expface_kernels.__version__,
        "commit": commit(),
        "gpu": cuda.describe() if device == "cuda" else None,
    }
