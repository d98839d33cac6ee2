"""glibc's malloc told to keep what is freed, which is the peers' best mode on a CPU.

As it comes, malloc gives every large buffer back to the system and asks for it again in the next step, and
each of its pages must be zeroed anew. Our own buffers are pooled and hardly notice.
"""

from __future__ import annotations

import ctypes

# Of malloc.h. No block is a mapping of its own, and the heap is never trimmed.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}


def unavailable() -> str | None:
    """Why malloc cannot be told; None where it can."""
    return None if hasattr(ctypes.CDLL(None), "mallopt") else "this system's malloc has no mallopt"


def keep_freed() -> None:
    """From now on, for this whole process; RuntimeError where malloc refuses."""
    mallopt = ctypes.CDLL(None).mallopt
    refused = [parameter for parameter, value in _SETTINGS.items() if mallopt(parameter, value) != 1]
    if refused:
        raise RuntimeError(f"mallopt refused parameters {refused}")
