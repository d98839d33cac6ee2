"""Developers' tools for the GPU kernels; only `autotune` needs a GPU, and training imports none of them.

recording.py      the launches of a step, recorded without data
audit.py          compile every kernel and look at what came out, over machine_code.py (registers, spills,
                  loads) and ring.py (races between copies and asynchronous products)
costs.py          FLOPs, bytes and a roofline, counted from the launches; traffic.py does it for operators
autotune.py       measure tiles on a GPU and write backends/triton/tuned.json
"""
