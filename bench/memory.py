"""Peak extra memory of a step, on the CPU each peer in a process of its own.

On a GPU: what torch's allocator had lent out at its peak. On the CPU, Linux only, a process draws a case's
inputs once and forks for each peer. What is read there is VmHWM, the kernel's own high-water mark of resident
memory, which writing 5 to /proc/self/clear_refs sets back: unlike samples of statm by a thread it misses no
peak, and unlike ru_maxrss it forgets what was there before. A step at tiny size comes first, or one of the
same size for what compiles, so that imports, thread pools and a compiler are loaded by then.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench import cuda, peers
from bench.cases import LARGEST_WITH_LOGITS, Case, Inputs
from bench.measure import run_step
from bench.peers.base import Peer, Step, in_a_line, terms
from bench.peers.ours import Ours
from bench.result import Memory
from expface_kernels import backends
from expface_kernels.machine import proc_bytes

TINY_ROWS, TINY_CLASSES = 8, 64
STEPS = 2
NOT_LINUX = "peak memory is read from Linux's /proc/self/clear_refs, which is not here"
_STATUS, _CLEAR_REFS = "/proc/self/status", Path("/proc/self/clear_refs")


class MeasurementError(RuntimeError):
    """The process that measured failed; the text says how."""


def unavailable(device: str = "cpu") -> str | None:
    """Why memory cannot be measured on this system; None where it can."""
    if device == "cuda":
        return cuda.unavailable()
    if _CLEAR_REFS.exists() and os.access(_CLEAR_REFS, os.W_OK):
        return None
    return NOT_LINUX


def measure_all(names: Sequence[str], case: Case) -> list[Memory]:
    """Extra bytes of each peer at the case; or the reason why not, or the error."""
    with Meter(case, names) as meter:
        return [_measure(name, case, meter) for name in names]


def _measure(name: str, case: Case, meter: Meter) -> Memory:
    peer = peers.get(name)
    own = terms(peer, case)
    reason = unavailable(case.device) or peer.why_not(own)
    if reason is None and case.classes > LARGEST_WITH_LOGITS and _holds_logits(peer, own):
        reason = f"it holds as much as the logits of all classes: measured to {LARGEST_WITH_LOGITS:,} only"
    entry = Memory(name, peer.label(own), case, None, reason, None)
    if reason is not None:
        return entry
    try:
        return dataclasses.replace(entry, extra_bytes=meter.extra_bytes(name, own))
    except MeasurementError as error:
        return dataclasses.replace(entry, error=str(error))
    except Exception as error:  # in this process, on a GPU: a peer may raise anything; the others go on
        return dataclasses.replace(entry, error=in_a_line(error))


def _holds_logits(peer: Peer, own: Case) -> bool:
    """Of all classes, or copies of the centres that are as large, by the peer's own estimate."""
    if isinstance(peer, Ours) or own.sample_rate != 1:
        return False
    return peer.extra_bytes(own) >= own.rows * own.classes * own.itemsize


class Meter:
    """Measures the peers of these names at one shape; a context manager.

    On the CPU it has, from the first measurement on, a process that holds the inputs and that every
    measurement is forked from. That process has one thread: a fork would lose others.
    """

    def __init__(self, case: Case, names: Sequence[str]) -> None:
        self.case, self.names = case, list(names)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def extra_bytes(self, name: str, case: Case) -> int:
        """Of the peer at this shape in the given terms; MeasurementError where that failed."""
        if case.device == "cuda":
            return _extra_bytes(name, self.case.inputs().of(case))
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps({"peer": name, "case": dataclasses.asdict(case)}), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise MeasurementError(f"the process ended with code {process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return int(answer["extra_bytes"])

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            fields = {"case": dataclasses.asdict(self.case), "peers": self.names}
            job = json.dumps({**fields, "threads": torch.get_num_threads()})
            # The process must find bench, and peers from elsewhere, where this one does.
            env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
            command, pipe = [sys.executable, "-m", "bench.memory", job], subprocess.PIPE
            # In a session of its own: an interrupt from the keyboard is for us, who end it.
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True
            )
        return self._process


def _extra_bytes(name: str, inputs: Inputs) -> int:
    """Peak memory of STEPS steps in this process, less what was there before and the gradients."""
    peer, case = peers.get(name), inputs.case
    step = peer.step(inputs)
    if peer.compiles or case.device == "cuda":
        run_step(step, inputs)
    else:
        tiny = case.at_most(TINY_ROWS, TINY_CLASSES).inputs()
        run_step(peer.step(tiny), tiny)
    if case.device == "cuda":
        return allocated_bytes(step, inputs)
    inputs.drop_gradients()

    def steps() -> None:
        for _ in range(STEPS):
            run_step(step, inputs)

    return resident_growth(steps) - case.gradient_bytes


def resident_growth(action: Callable[[], object]) -> int:
    """Bytes of resident memory at this process's peak while `action` runs, less what was there before."""
    _trim()
    _CLEAR_REFS.write_text("5")
    before = proc_bytes(_STATUS, "VmRSS")
    action()
    peak = proc_bytes(_STATUS, "VmHWM")
    assert before is not None
    assert peak is not None
    return peak - before


def allocated_bytes(step: Step, inputs: Inputs) -> int:
    """The same on a GPU, for a step that has been warmed up."""
    inputs.drop_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        run_step(step, inputs)
    return torch.cuda.max_memory_allocated() - before - inputs.case.gradient_bytes


def _trim() -> None:
    """Give freed memory back where the C library can: a step that reuses it would look free of charge."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _answer(job: dict[str, Any], inputs: Inputs, threads: int) -> dict[str, Any]:
    """What a forked process says of one measurement: {"extra_bytes": …} or {"error": …}."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(threads)
            answer: dict[str, Any] = {
                "extra_bytes": _extra_bytes(job["peer"], inputs.of(Case(**job["case"])))
            }
        except BaseException as error:  # a peer may raise anything; it must not reach the parent's code
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return dict(json.loads(text))
    return {"error": f"the process was killed by signal {os.waitstatus_to_exitcode(status) * -1}"}


def _serve() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    inputs = Case(**job["case"]).inputs()
    # What every fork would load again.
    backends.available()
    for module in {module for name in job["peers"] for module in peers.get(name).loads}:
        importlib.import_module(module)
    # Libraries print to stdout now and then: answers go to what it was, they to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), inputs, job["threads"])), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
