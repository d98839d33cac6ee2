"""Numbers as people write them on a command line; for argparse's `type`."""

from __future__ import annotations

import argparse
import re

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def whole(text: str) -> int:
    """A whole number, 0 or more: 1000000, 1_000_000, 1e6 or 1M."""
    return _number(text, r"(?P<suffix>[kmg]?)", "250000 or 250k")


def count(text: str) -> int:
    """A whole number above 0, in the same forms."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text!r}")
    return number


def byte_count(text: str) -> int:
    """Bytes, 0 or more, in the same forms and as 256M, 8GB (powers of 1000), 256MiB (of 1024)."""
    return _number(text, r"(?P<suffix>[kmg]i?|)b?", "268435456, 256MiB or 8GB")


def _number(text: str, unit: str, example: str) -> int:
    found = re.fullmatch(r"(?P<number>[0-9._]+(?:e[+-]?[0-9]+)?) ?" + unit, text.strip(), re.IGNORECASE)
    try:
        if found is None:
            raise ValueError
        digits, factor = found["number"], _SUFFIXES.get(found["suffix"].lower(), 1)
        # Through a float only where it is written as one: a float holds 53 bits.
        number = int(digits) * factor if digits.replace("_", "").isdecimal() else float(digits) * factor
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a whole number such as {example}, got {text!r}") from None
    return int(number)
