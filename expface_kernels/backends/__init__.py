"""Backends by name. Each serves one kind of device and says what it cannot do.

"auto" takes the device's own: triton for a GPU, cpu for the CPU, reference for float64 on a GPU. One that
cannot serve raises, with its reason; nothing falls back silently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expface_kernels.backends.base import Backend, OpBackend
from expface_kernels.backends.cpu import CpuBackend
from expface_kernels.backends.reference import ReferenceBackend
from expface_kernels.backends.triton import TritonBackend

REFERENCE = ReferenceBackend()
_OP_BACKENDS: dict[str, OpBackend] = {"cpu": CpuBackend(), "triton": TritonBackend()}
_BACKENDS: dict[str, Backend] = {"reference": REFERENCE, **_OP_BACKENDS}


def available() -> dict[str, str]:
    """Map each backend's name to "ok", or to the reason why it cannot run on this machine."""
    return {name: backend.unavailable() or "ok" for name, backend in _BACKENDS.items()}


def check_name(backend: str) -> None:
    """Raise ValueError for a name there is not."""
    names = ["auto", *_BACKENDS]
    if backend not in names:
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")


def resolve(backend: str, x: Tensor, w: Tensor) -> str:
    """Return the name of the backend that `backend` means for these inputs; ValueError if unknown."""
    check_name(backend)
    if backend != "auto":
        return backend
    if x.device.type == "cpu":
        return "cpu"
    return "reference" if torch.float64 in (x.dtype, w.dtype) else "triton"


def op_backend(name: str) -> OpBackend:
    """Return the backend of that name that the op calls."""
    return _OP_BACKENDS[name]


def require_backend(name: str, x: Tensor, w: Tensor) -> Backend:
    """Return the backend, able to take x and w; RuntimeError with its reason where it is not."""
    backend = REFERENCE if name == "reference" else op_backend(name)
    _check_serves(backend, x, w)
    return backend


def require_op_backend(name: str, x: Tensor, w: Tensor) -> OpBackend:
    """Do the same for the op."""
    backend = op_backend(name)
    _check_serves(backend, x, w)
    return backend


def _check_serves(backend: Backend, x: Tensor, w: Tensor) -> None:
    reason = backend.unavailable() or backend.why_not(x, w)
    if reason is not None:
        raise RuntimeError(_refusal(backend.name, reason))


def _refusal(name: str, reason: str) -> str:
    return f'backend "{name}" cannot serve this call: {reason}. backend="reference" always can, slowly'
