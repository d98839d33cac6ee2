"""Measure jobs for real, in this process: `python -m tests.test_plan.measured`, JSON in and out (Linux).

Peak resident bytes of steps of a head and its optimizer, less what was there before the head.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from expface_kernels import MarginSoftmaxHead
from expface_kernels.backends import workspace
from expface_kernels.plan import Job
from expface_kernels.plan.optimizers import OPTIMIZERS

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 3


def status(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Training:
    """The head of a job on the CPU, its optimizer and one batch."""

    def __init__(self, job: Job, group: Any = None) -> None:
        sampling: dict[str, Any] = {}
        if job.sample_rate < 1:
            sampling = {"sample_rate": job.sample_rate, "sparse_grad": job.sparse_grad}
        self.head = MarginSoftmaxHead(
            job.features, job.classes, workspace_bytes=job.workspace_bytes, dtype=job.centre_dtype,
            process_group=group, **sampling,
        )  # fmt: skip
        kind, arguments = OPTIMIZERS[job.optimizer]
        if job.optimizer != "sparse-adam":
            arguments = arguments | {"weight_decay": job.weight_decay}
        if job.fused:
            arguments = arguments | {"fused": True}
        self.optimizer = getattr(torch.optim, kind)(self.head.parameters(), **arguments)
        self.x = torch.randn(job.batch, job.features, dtype=job.row_dtype).requires_grad_()
        self.labels = torch.randint(job.classes, (job.batch,))

    def step(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.x.grad = None
        loss = self.head(self.x, self.labels)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def peak_bytes(job: Job, group: Any = None) -> int:
    """Of this process; a group's ranks call it together."""
    before = _settled()
    training = Training(job, group)
    _settled()  # drawing the centres took as much again
    CLEAR_REFS.write_text("5")
    for _ in range(STEPS):
        training.step()
    return status("VmHWM") - before


def rank_peaks(group: Any, jobs: list[dict[str, Any]]) -> list[int]:
    """Of this rank of the group, which every job has as its ranks."""
    Training(Job(classes=100, features=8, batch=4, ranks=group.size()), group).step()  # what is loaded once
    return [peak_bytes(Job(**job), group) for job in jobs]


def _settled() -> int:
    """Resident bytes once everything freed has gone back to the system."""
    gc.collect()
    workspace.clear()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


if __name__ == "__main__":
    torch.set_num_threads(1)
    Training(Job(classes=100, features=8, batch=4)).step()  # what is loaded once
    print(json.dumps([peak_bytes(Job(**job)) for job in json.load(sys.stdin)]))
