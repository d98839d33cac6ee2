"""Measures the peak extra memory of a step, on the CPU each number in a process of its own.

On a GPU it is what torch's allocator had lent out at its peak. On the CPU, Linux only, it is VmHWM, the
kernel's own high-water mark of resident memory, which writing 5 to /proc/self/clear_refs sets back: unlike
samples of statm by a thread it misses no peak, and unlike ru_maxrss it forgets what was there before. A step
at tiny size comes first, or one of the same size for what compiles, so that imports, thread pools and a
compiler are loaded by then.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import machine, peers
from bench.cases import Case, Inputs
from bench.measure import KEEP_MEMORY, run_step
from bench.peers.base import Step
from expface_kernels.machine import proc_bytes

TINY_ROWS, TINY_CLASSES = 8, 64
STEPS = 2
_STATUS, _CLEAR_REFS = "/proc/self/status", Path("/proc/self/clear_refs")


class MeasurementError(RuntimeError):
    """The process that measured failed; the text says how."""


def unavailable(device: str = "cpu") -> str | None:
    """Say why memory cannot be measured on this system; None where it can."""
    if device == "cuda":
        return machine.gpu_unavailable()
    if _CLEAR_REFS.exists() and os.access(_CLEAR_REFS, os.W_OK):
        return None
    return "peak memory is read from Linux's /proc/self/clear_refs, which is not here"


def extra_bytes(name: str, case: Case) -> int:
    """Measure the peer at a case that it supports; MeasurementError where its process failed."""
    if case.device == "cuda":
        return _measured(name, case)
    job = {"peer": name, "case": dataclasses.asdict(case), "threads": torch.get_num_threads()}
    return int(output_of_child(["-m", "bench.memory", json.dumps(job)]))


def output_of_child(arguments: list[str]) -> str:
    """Return the last line that a new Python prints; MeasurementError with its last words where it fails."""
    # It must find bench, and peers from elsewhere, where this process does.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    env = {name: value for name, value in env.items() if name not in KEEP_MEMORY}
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, env=env)
    if done.returncode < 0:
        raise MeasurementError(f"the process was killed by signal {-done.returncode}")
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise MeasurementError(words[-1] if words else f"the process ended with code {done.returncode}")
    return done.stdout.strip().splitlines()[-1]


def _measured(name: str, case: Case) -> int:
    """Measure STEPS steps in this process, less what was there before and the gradients."""
    inputs, peer = case.inputs(), peers.get(name)
    step = peer.step(inputs)
    if peer.compiles or case.device == "cuda":
        run_step(step, inputs)
    else:
        tiny = case.at_most(TINY_ROWS, TINY_CLASSES).inputs()
        run_step(peer.step(tiny), tiny)
    if case.device == "cuda":
        return _allocated_bytes(step, inputs)
    inputs.drop_gradients()

    def steps() -> None:
        for _ in range(STEPS):
            run_step(step, inputs)

    return resident_growth(steps) - case.gradient_bytes


def resident_growth(action: Callable[[], object]) -> int:
    """Return this process's peak of resident bytes while `action` runs, less what was there before."""
    # Freed memory goes back where the C library can: a step that reused it would look free of charge.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")
    before = proc_bytes(_STATUS, "VmRSS")
    action()
    peak = proc_bytes(_STATUS, "VmHWM")
    assert before is not None
    assert peak is not None
    return peak - before


def _allocated_bytes(step: Step, inputs: Inputs) -> int:
    """Return the same on a GPU, for a step that has been warmed up."""
    inputs.drop_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        run_step(step, inputs)
    return torch.cuda.max_memory_allocated() - before - inputs.case.gradient_bytes


def _main(job: str) -> None:
    fields = json.loads(job)
    torch.set_num_threads(fields["threads"])
    print(_measured(fields["peer"], Case(**fields["case"])))


if __name__ == "__main__":
    _main(sys.argv[1])
