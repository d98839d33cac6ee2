"""Finds peers by name. A new one is a class derived from `base.Peer` in a file here, and a line below."""

from __future__ import annotations

import importlib

from bench.peers.base import Peer, supported_case
from bench.peers.heads import Compiled, Eager, Ours, OursSampled, PartialFC
from bench.peers.libraries import CutCrossEntropy, Liger, MetricLearning, TorchLinear

__all__ = ["BASELINE", "PEERS", "SAMPLED_BASELINE", "baseline", "get", "is_ours", "names", "supported_case"]

_ALL: tuple[Peer, ...] = (
    Ours(),
    Eager(),
    Compiled("static"),
    Compiled("autotuned"),
    MetricLearning("arcface", "ArcFaceLoss"),
    MetricLearning("cosface", "CosFaceLoss"),
    TorchLinear("plain"),
    TorchLinear("compiled"),
    TorchLinear("autotuned"),
    TorchLinear("chunked"),
    CutCrossEntropy("cce"),
    CutCrossEntropy("cce_exact"),
    Liger(),
    OursSampled(),
    PartialFC(),
)
# Found by name only: the same code as another, compiled or chunked in another way.
_MORE: tuple[Peer, ...] = (Compiled("dynamic"), TorchLinear("dynamic"), TorchLinear("auto"))
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
_BY_NAME = PEERS | {peer.name: peer for peer in _MORE}

BASELINE = "eager"
"""The peer that ratios are against."""
SAMPLED_BASELINE = "partial_fc"
"""The same for peers that sample the classes."""
_SAMPLED = {peer.name for peer in _ALL if peer.sample_rate != 1}


def names() -> list[str]:
    """List all that `get` knows by name."""
    return list(_BY_NAME)


def baseline(name: str) -> str:
    """Return the peer that this one's ratio is against: it does the same work."""
    return SAMPLED_BASELINE if name in _SAMPLED else BASELINE


def is_ours(name: str) -> bool:
    """Tell whether the name is one of this package's head, whatever its workspace."""
    return name.partition("@")[0] in ("ours", "ours_sampled")


def get(name: str) -> Peer:
    """Return the peer of that name; ValueError where there is none.

    A name of PEERS, "ours@N" for a workspace of N bytes, or "package.module:ATTRIBUTE".
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.startswith("ours@") and name.removeprefix("ours@").isdecimal():
        return Ours(int(name.removeprefix("ours@")))
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            peer: Peer = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # ".x:y" is a TypeError, and a module may raise anything
            raise ValueError(f"peers: {name!r} cannot be imported: {error}") from error
        if not isinstance(peer, Peer):
            raise ValueError(
                f"peers: expected {name!r} to be a bench.peers.base.Peer, got {type(peer).__name__}"
            )
        return peer
    raise ValueError(
        f"peers: expected names of {list(_BY_NAME)}, ours@BYTES or package.module:ATTRIBUTE, got {name!r}"
    )
