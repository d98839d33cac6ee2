"""Peers by name. A new one is a file here with a class like `base.Peer`, and a line in PEERS."""

from __future__ import annotations

import importlib

from bench.peers.base import Peer
from bench.peers.compiled import Compiled
from bench.peers.eager import Eager
from bench.peers.ours import Ours

BASELINE = "eager"
"""The peer that ratios are against."""
PEERS: dict[str, Peer] = {peer.name: peer for peer in (Ours(), Eager(), Compiled())}


def get(name: str) -> Peer:
    """The peer of that name; ValueError where there is none.

    A name of PEERS, "ours@N" for a workspace of N bytes, or "package.module:ATTRIBUTE".
    """
    if name in PEERS:
        return PEERS[name]
    if name.startswith("ours@") and name.removeprefix("ours@").isdecimal():
        return Ours(int(name.removeprefix("ours@")))
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            peer: Peer = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"peers: {name!r} cannot be imported: {error}") from error
        return peer
    raise ValueError(
        f"peers: expected names of {list(PEERS)}, ours@BYTES or package.module:ATTRIBUTE, got {name!r}"
    )
