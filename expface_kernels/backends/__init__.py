"""Backends by name. Each implements the op for one kind of device and says what it cannot do.

"auto" takes the device's own: triton for a GPU, cpu for the CPU, reference for float64 on a GPU. One that
cannot serve raises, with its reason; nothing falls back silently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expface_kernels.backends.base import Backend
from expface_kernels.backends.cpu import CpuBackend
from expface_kernels.backends.reference import ReferenceBackend

_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (ReferenceBackend(), CpuBackend())}
# Backends that "auto" would choose and that this version does not have.
_MISSING = {"triton": "this version has no GPU kernels yet"}


def available() -> dict[str, str]:
    """Name of each backend -> "ok", or the reason why it cannot run on this machine."""
    return {name: backend.unavailable() or "ok" for name, backend in _BACKENDS.items()} | _MISSING


def resolve(backend: str, x: Tensor, w: Tensor) -> str:
    """The name of the backend that `backend` means for these inputs; ValueError for a name there is not."""
    names = ["auto", *_BACKENDS, *_MISSING]
    if backend not in names:
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    if backend != "auto":
        return backend
    if x.device.type == "cpu":
        return "cpu"
    return "reference" if torch.float64 in (x.dtype, w.dtype) else "triton"


def get(name: str) -> Backend:
    """The backend itself, whether or not it can run."""
    if name in _MISSING:
        raise RuntimeError(_refusal(name, _MISSING[name]))
    return _BACKENDS[name]


def serving(name: str, x: Tensor, w: Tensor) -> Backend:
    """The backend, able to take x and w; RuntimeError with the reason where it is not."""
    backend = get(name)
    reason = backend.unavailable() or backend.why_not(x, w)
    if reason is not None:
        raise RuntimeError(_refusal(name, reason))
    return backend


def _refusal(name: str, reason: str) -> str:
    return f'backend "{name}" cannot serve this call: {reason}. backend="reference" always can, slowly'
