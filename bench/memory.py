"""Peak extra memory of a step, each peer and case in a process of its own (Linux only).

`python -m bench.memory '{"peer": …, "case": {…}}'` is that process. What is read is VmHWM, the kernel's own
high-water mark of resident memory, which writing 5 to /proc/self/clear_refs sets back: unlike samples of
statm by a thread it misses no peak, and unlike ru_maxrss it forgets what was there before. A step at tiny
size comes first, so that imports, thread pools and a compiler are loaded by then.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from bench import machine, peers
from bench.cases import Case
from bench.measure import run_step
from bench.result import Memory

TINY_ROWS, TINY_CLASSES = 8, 64
STEPS = 2
_STATUS, _CLEAR_REFS = "/proc/self/status", Path("/proc/self/clear_refs")


def unavailable() -> str | None:
    """Why memory cannot be measured on this system; None where it can."""
    if _CLEAR_REFS.exists() and os.access(_CLEAR_REFS, os.W_OK):
        return None
    return "peak memory is read from Linux's /proc/self/clear_refs, which is not here"


def measure(name: str, case: Case) -> Memory:
    """Extra bytes of the peer, measured in a fresh process; or the reason why not, or the error."""
    peer = peers.get(name)
    nothing = Memory(name, peer.label(case), case, None, unavailable() or peer.why_not(case), None)
    if nothing.why_not:
        return nothing
    job = json.dumps({"peer": name, "case": dataclasses.asdict(case)})
    # The child must find bench, and peers from elsewhere, where this process does.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", job], capture_output=True, text=True, check=False, env=env
    )
    if done.returncode < 0:
        return dataclasses.replace(nothing, error=f"the process was killed by signal {-done.returncode}")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return dataclasses.replace(nothing, error=lines[-1])
    return dataclasses.replace(nothing, extra_bytes=int(done.stdout.splitlines()[-1]))


def extra_bytes(name: str, case: Case) -> int:
    """Peak resident memory of STEPS steps in this process, less what was there before and the gradients."""
    peer = peers.get(name)
    tiny = case.at_most(TINY_ROWS, TINY_CLASSES).inputs()
    run_step(peer.step(tiny), tiny)
    inputs = case.inputs()
    step = peer.step(inputs)
    if peer.compiles:
        run_step(step, inputs)
    inputs.drop_gradients()
    _trim()
    _CLEAR_REFS.write_text("5")
    before = machine.proc_bytes(_STATUS, "VmRSS")
    for _ in range(STEPS):
        run_step(step, inputs)
    peak = machine.proc_bytes(_STATUS, "VmHWM")
    assert before is not None
    assert peak is not None
    return peak - before - case.gradient_bytes


def _trim() -> None:
    """Give freed memory back where the C library can: a step that reuses it would look free of charge."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _main() -> None:
    job = json.loads(sys.argv[1])
    print(extra_bytes(job["peer"], Case(**job["case"])))


if __name__ == "__main__":
    _main()
