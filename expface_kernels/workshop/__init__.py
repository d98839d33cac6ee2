"""Developers' tools for the GPU kernels; only `autotune` needs a GPU, and training imports none of them.

recording.py   record the launches of a step without data
audit.py       compile every kernel and look at what came out: machine_code.py reads registers, spills and
               loads, ring.py finds races between copies and asynchronous products, over ttgir.py
costs.py       count FLOPs, bytes and a roofline from the launches; traffic.py does it for torch's operators
autotune.py    measure tiles (candidates.py) on a GPU and write backends/triton/tuned.json
"""
