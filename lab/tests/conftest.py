"""Fixtures of the lab's tests: one thread, and the shipped data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from examples.glyphs import dataset


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def glyphs() -> dataset.Glyphs:
    return dataset.load()
