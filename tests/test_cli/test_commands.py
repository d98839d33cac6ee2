"""Numbers of a command line in every form that people write."""

from __future__ import annotations

import argparse

import pytest

from expface_kernels.commands import byte_count, count, whole


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("1_000_000", 10**6),
        ("1e6", 10**6),
        ("1.5e3", 1500),
        ("0.5M", 500_000),
        ("250k", 250_000),
        ("3G", 3 * 10**9),
        ("9007199254740993", 2**53 + 1),  # which no float is
    ],
)
def test_whole_numbers(text: str, number: int) -> None:
    assert whole(text) == number
    assert byte_count(text) == number
    if number:
        assert count(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("256MiB", 2**28),
        ("256mi", 2**28),
        ("1.5KiB", 1536),
        ("12B", 12),
    ],
)
def test_bytes_have_units(text: str, number: int) -> None:
    assert byte_count(text) == number
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number such as 250000 or 250k"):
        whole(text)


@pytest.mark.parametrize(
    "text", ["", "many", "1.5", "-3", "nan", "inf", "1e999", "0x10", "1..5", "8XB", "1MM"]
)
def test_what_is_no_whole_number(text: str) -> None:
    for read in (whole, count, byte_count):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a whole number such as .*, got "):
            read(text)
    with pytest.raises(argparse.ArgumentTypeError, match="expected at least 1, got '0'"):
        count("0")
