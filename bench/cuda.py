"""What is particular to a GPU: whether there is one, its memory, card, driver and clocks, waiting for it."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

_QUERIES = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "largest_sm_clock_mhz": "clocks.max.sm",
    "power_limit_watts": "power.limit",
}


def unavailable() -> str | None:
    """Why nothing can run on a GPU here; None where it can."""
    if torch.cuda.is_available():
        return None
    return "there is no GPU: torch.cuda.is_available() is False"


def available_bytes() -> int:
    """Memory that can still be had: the card's free memory, and what torch has taken and does not use."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def synchronise(device: str) -> None:
    """Wait for the GPU; nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def describe() -> dict[str, Any]:
    """Card, memory in bytes, driver, clocks in MHz as they are now; None where a tool does not tell."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cards": torch.cuda.device_count(),
        "cuda": torch.version.cuda or torch.version.hip,
        **smi(),
    }


def smi() -> dict[str, str | None]:
    """What nvidia-smi says of the first card; None for each where it is not there or fails."""
    fields = ",".join(_QUERIES.values())
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_QUERIES)
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    if len(values) != len(_QUERIES):
        return dict.fromkeys(_QUERIES)
    return dict(zip(_QUERIES, values, strict=True))
