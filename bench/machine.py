"""What the numbers were measured on: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expface_kernels
from bench import cuda
from expface_kernels import backends, machine

_ROOT = Path(__file__).resolve().parents[1]
NOT_CODE = (":!bench/results", ":!README.md")


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that can be had on the device, without swapping; None where it cannot be told (off Linux)."""
    if device == "cuda":
        return cuda.available_bytes() if cuda.unavailable() is None else None
    return machine.available_bytes()


def instruction_set() -> str:
    """Of the cpu backend's kernels; or why there are none."""
    name: str = machine.extension().get("instruction_set") or backends.available()["cpu"]
    return name


def commit() -> str:
    """Short hash of the checkout, with "-dirty" where tracked files differ from it; else "unknown".

    Results and README, which runs before this one may have written anew, do not count.
    """
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything above, versions, processes that ran in the last minute, the GPU if that is what is measured.

    Memory in bytes.
    Called before anything is measured: a load then is somebody else's, and the numbers suffer from it.
    """
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "memory_bytes": machine.memory_bytes(),
        "instruction_set": instruction_set(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "numpy": np.__version__,
        "expface_kernels": expface_kernels.__version__,
        "commit": commit(),
        "gpu": cuda.describe() if device == "cuda" else None,
    }
