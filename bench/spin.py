"""Another process that keeps one core busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It also ends by itself when its parent is gone, however that ended.
_LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def spinning(wanted: bool) -> Iterator[None]:
    """While inside, if `wanted`, one process spins, on the core that the system gives it, as to any."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", _LOOP, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()
