"""Describes what the numbers were measured on: hardware, versions, commit, the GPU if that is measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expface_kernels
from expface_kernels import backends, machine

_ROOT = Path(__file__).resolve().parents[1]
NOT_CODE = (":!bench/results", ":!README.md", ":!docs/benchmarks.md")
_NVIDIA_SMI = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "largest_sm_clock_mhz": "clocks.max.sm",
    "power_limit_watts": "power.limit",
}


def gpu_unavailable() -> str | None:
    """Say why nothing can run on a GPU here; None where it can."""
    if torch.cuda.is_available():
        return None
    return "there is no GPU: torch.cuda.is_available() is False"


def available_bytes(device: str = "cpu") -> int | None:
    """Return the memory that can be had without swapping; None where it cannot be told (off Linux)."""
    if device == "cpu":
        return machine.available_bytes()
    if gpu_unavailable() is not None:
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def synchronize(device: str) -> None:
    """Wait for the GPU; nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def commit() -> str:
    """Return the short hash of the checkout, with "-dirty" where tracked code differs; else "unknown".

    Results and the documents written from them do not count: an earlier run may have rewritten them.
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
    """Collect hardware, versions, commit and load; memory in bytes.

    It is called before anything is measured: a load then is somebody else's, and the numbers suffer from it.
    """
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "memory_bytes": machine.memory_bytes(),
        "instruction_set": machine.extension().get("instruction_set") or backends.available()["cpu"],
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "numpy": np.__version__,
        "expface_kernels": expface_kernels.__version__,
        "commit": commit(),
        "gpu": describe_gpu() if device == "cuda" else None,
    }


def describe_gpu() -> dict[str, Any]:
    """Name the card, its memory in bytes, driver, clocks in MHz as they are; None where a tool is silent."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cards": torch.cuda.device_count(),
        "cuda": torch.version.cuda or torch.version.hip,
        **nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str | None]:
    """Ask nvidia-smi about the first card; None for each answer where it is not there or fails."""
    fields = ",".join(_NVIDIA_SMI.values())
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_NVIDIA_SMI)
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    if len(values) != len(_NVIDIA_SMI):
        return dict.fromkeys(_NVIDIA_SMI)
    return dict(zip(_NVIDIA_SMI, values, strict=True))
