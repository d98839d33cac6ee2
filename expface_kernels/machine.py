"""What this process runs on: versions, processors, memory, vector code, threads. Bytes throughout.

What can only be read from Linux's /proc is None elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from expface_kernels import backends
from expface_kernels.backends import products

PACKAGES = ("torch", "triton", "numpy")
# As vendors name them: GNU's, LLVM's, Intel's, Microsoft's.
_OPENMP = re.compile(r"/(?:libgomp|libomp|libiomp5|libomp5|vcomp)[^/]*$")


def available_bytes() -> int | None:
    """Memory that can be had without swapping."""
    return proc_bytes("/proc/meminfo", "MemAvailable")


def memory_bytes() -> int | None:
    """All memory of the machine."""
    return proc_bytes("/proc/meminfo", "MemTotal")


def cpu_model() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def extension() -> dict[str, Any]:
    """The C++ extension's vector code in use, what else it could run here, and whose threads it runs on.

    Empty where it does not load; `backends.available()` says why.
    """
    if backends.available()["cpu"] != "ok":
        return {}
    loaded = importlib.import_module("expface_kernels._C")
    return {
        "instruction_set": loaded.instruction_set(),
        "instruction_sets": loaded.instruction_sets(),
        "thread_runtime": loaded.thread_runtime(),
    }


def openmp_runtimes() -> list[str] | None:
    """Paths of those loaded in this process: two that spin on the same cores can cost a factor of 20."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _OPENMP.search(path))


def version_of(package: str) -> str | None:
    """Of an installed package; None for one that is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of Python, this package and what it computes with; None where that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: version_of(package) for package in ("expface_kernels", *PACKAGES)}
    found["torch"] = torch.__version__  # with its build: +cpu, +cu130
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "architecture": getattr(properties, "gcnArchName", None),
            }
        )
    return found


def describe() -> dict[str, Any]:
    """Everything above."""
    return {
        "versions": versions(),
        "system": platform.platform(),
        "executable": sys.executable,
        "backends": backends.available(),
        "cpu": {
            "model": cpu_model(),
            "cores": cores(),
            "memory_bytes": memory_bytes(),
            "products": products.of(torch.float32).name,
            **extension(),
        },
        "threads": {
            "torch": torch.get_num_threads(),
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")},
        },
        "openmp_runtimes": openmp_runtimes(),
        "gpus": gpus(),
    }


def _proc_field(path: str, field: str) -> str | None:
    """Value of the first "field: value" line of a file of /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == field), None)


def proc_bytes(path: str, field: str) -> int | None:
    """A field that /proc gives in kB."""
    value = _proc_field(path, field)
    return None if value is None else int(value.split()[0]) * 1024
