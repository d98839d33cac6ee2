"""Count what operators hold and move, by running them: on any device, with data or (meta tensors) without."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}
_FILLED = {
    _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full,
}  # fmt: skip
_GATHERS = {_aten.index}
_SCATTERS = {_aten.index_put_, _aten._index_put_impl_}

# Fused optimizers may write to gradients, to unscale them; without a scale, which nobody passes, they do not.
_UNWRITTEN = {"grads"}


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id_of(tensor) not in inputs | self.alive.keys():
                self._born(tensor)
        return out

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id_of(tensor)
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TrafficCounter(TorchDispatchMode):
    """Bytes that operators read and write, as if every tensor went through memory once an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes += traffic(func, args, out)
        return out


def traffic(func: Any, args: Any, out: Any) -> int:
    """Bytes that one operator reads and writes."""
    packet, returns = func.overloadpacket, func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if view or packet in _ALLOCATIONS:
        return 0
    if packet in _GATHERS:
        return 2 * _bytes(out) + _bytes(args[1])
    if packet in _SCATTERS:
        return 2 * _bytes(args[2]) + _bytes(args[1])
    if packet in _FILLED:
        return _bytes(out)
    if packet is _aten.scatter_:
        return _bytes(args[2]) + args[2].numel() * (args[0].element_size() + _element_size(args[3]))
    written = _bytes(out)
    if not returns:  # in place over lists of tensors: what is written shows in the arguments alone
        written = sum(
            _bytes(value)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.is_write and argument.name not in _UNWRITTEN
        )
    return _bytes(args) + written


def _element_size(value: Any) -> int:
    return value.element_size() if isinstance(value, Tensor) else 0


def _bytes(tensors: Any) -> int:
    """Of all tensors in there; what is expanded lies in memory once."""
    found = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in found)
