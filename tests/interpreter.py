"""Triton's interpreter, less slow: it patches the language anew for every call of a device function.

That is most of the time of a small kernel. Once for each kernel that is launched does the same.
"""

from __future__ import annotations

from typing import Any


def patch_once_a_launch() -> None:
    """Make nested device functions reuse the patches of the launch they are part of."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    def once(fn: Any) -> Any:
        modules = tuple(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return None  # a device function drops what it gets
        patched.add(modules)
        return patch_lang(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched
