"""The C++ kernels one by one, on every instruction set of this machine; nothing written past the end.

R classes of a tile · B rows · D features · dots (R, B) class-major · inv (R,) 1/|w_j|
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from expface_kernels.backends import native
from tests.tolerances import FLOAT32_QUOTIENT, relative_error

extension = native._load()
LOG2_E = math.log2(math.e)
LN2 = math.log(2)  # as scale it makes the exponent equal to the dot product
DTYPES = (torch.float32, torch.float64)
# Sizes below, at and past the vectors of 4 to 16 lanes, the last past the sum of 1024 classes.
TILES = ((1, 1), (1, 5), (3, 7), (16, 16), (17, 33), (1025, 5))


@pytest.fixture(params=extension.instruction_sets(), autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = extension.instruction_set()
    extension.use_instruction_set(request.param)
    assert extension.instruction_set() == request.param
    yield
    extension.use_instruction_set(chosen)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _no_labels(batch: int) -> Tensor:
    return torch.full((batch,), -1)


def _exp2(z: Tensor) -> Tensor:
    """What backward_tile makes of exponents z (N,): 2^z."""
    dots = z.clone().reshape(1, -1)
    zeros = torch.zeros_like(z)
    native.Kernels(z.dtype).backward_tile(dots, torch.ones(1, dtype=z.dtype), LN2, _no_labels(len(z)), zeros)
    return dots[0]


def _ulps(actual: Tensor, exact: np.ndarray) -> float:
    spacing = np.spacing(exact.astype(actual.numpy().dtype)).astype(np.longdouble)
    return float((np.abs(actual.numpy().astype(np.longdouble) - exact) / spacing).max())


def test_the_exponential_is_within_2_ulp(dtype: torch.dtype) -> None:
    lowest = {torch.float32: -126, torch.float64: -1022}[dtype]
    near_zero = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
    everywhere = torch.linspace(lowest, 100, 20_001, dtype=torch.float64)
    halves = torch.arange(-60, 60, dtype=torch.float64) + 0.5  # where rounding to a whole number turns
    z = torch.cat([near_zero, everywhere, halves, halves - 1e-7]).to(dtype)
    assert _ulps(_exp2(z), np.exp2(z.numpy().astype(np.longdouble))) <= 2


def test_the_exponential_of_a_whole_number_is_exact(dtype: torch.dtype) -> None:
    z = torch.arange(-126, 100, dtype=dtype)
    assert torch.equal(_exp2(z), torch.exp2(z.double()).to(dtype))


def test_the_exponential_is_exactly_0_far_below_and_nan_stays_nan(dtype: torch.dtype) -> None:
    lowest = {torch.float32: -126.0, torch.float64: -1022.0}[dtype]
    below = [lowest * (1 + 1e-6), lowest - 1, 2 * lowest, -1e9, -1e30, -torch.finfo(dtype).max, -math.inf]
    assert torch.equal(_exp2(torch.tensor(below, dtype=dtype)), torch.zeros(len(below), dtype=dtype))
    smallest = _exp2(torch.tensor([lowest], dtype=dtype))
    assert float(smallest) == torch.finfo(dtype).tiny
    # Among ordinary neighbours, in every lane.
    for lane in range(20):
        z = torch.zeros(20, dtype=dtype)
        z[lane] = math.nan
        assert _exp2(z).isnan().nonzero().tolist() == [[lane]]
        assert float(_exp2(z).nansum()) == 19


def _forward(
    dots: Tensor, inv: Tensor, y: Tensor, scale: float, hardest: bool = True, threads: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(e, tile_max, tile_sum, hardest); every output starts as NaN or −7."""
    batch = dots.shape[1]
    kernels = native.Kernels(dots.dtype)
    kernels.threads = threads
    e = dots.clone()
    tile_max = torch.full((batch,), math.nan, dtype=dots.dtype)
    tile_sum = torch.full((batch,), math.nan, dtype=torch.float64)
    found = torch.full((batch,), -7) if hardest else None
    kernels.forward_tile(e, inv, scale, y, tile_max, tile_sum, found)
    return e, tile_max, tile_sum, found


def _tile(rows: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(dots, inv, y): cosines times norms of 1e-3 to 1e3; labels in the tile, before it and behind it."""
    norms = 10 ** (_random(rows, seed=1).clamp(-2, 2) * 1.5)
    dots = torch.tanh(_random(rows, batch)) * norms[:, None]  # no ties, which would have no one maximum
    y = torch.arange(batch) % (rows + 2) - 1
    return dots.to(dtype), (1 / norms).to(dtype), y


def _masked_exponents(dots: Tensor, inv: Tensor, y: Tensor, scale: float) -> Tensor:
    z = dots.double() * inv.double()[:, None] * (scale * LOG2_E)
    inside = (y >= 0) & (y < dots.shape[0])
    z[y[inside], inside.nonzero()[:, 0]] = -math.inf
    return z


@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])
@pytest.mark.parametrize("tile", TILES)
def test_a_forward_tile_has_the_right_maxima_sums_exponentials_and_classes(
    tile: tuple[int, int], scale: float, dtype: torch.dtype
) -> None:
    dots, inv, y = _tile(*tile, dtype)
    z = _masked_exponents(dots, inv, y, scale)
    best, arg = z.max(dim=0)
    none = best == -math.inf
    right = torch.exp2(z - torch.where(none, 0.0, best))
    e, tile_max, tile_sum, hardest = _forward(dots, inv, y, scale)
    # A logit of s·cos carries s roundings, the sum some of its own.
    bound = {torch.float32: 1e-7, torch.float64: 2e-16}[dtype] * (12 + 2 * scale)
    assert torch.equal(tile_max == -math.inf, none)
    assert relative_error(tile_max[~none], best[~none]) < bound
    assert relative_error(tile_sum, right.sum(0)) < bound
    assert relative_error(e, right * inv.double()[:, None]) < bound
    assert torch.equal(hardest, torch.where(none, -1, arg))
    assert torch.equal(_forward(dots, inv, y, scale, hardest=False)[2], tile_sum)


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("tile", TILES)
def test_a_backward_tile_holds_probabilities_over_norms(
    tile: tuple[int, int], scale: float, dtype: torch.dtype
) -> None:
    dots, inv, y = _tile(*tile, dtype)
    z = _masked_exponents(dots, inv, y, scale)
    log2_l = torch.log2(torch.exp2(z).sum(0).clamp_min(1e-30)).to(dtype)
    p = dots.clone()
    native.Kernels(dtype).backward_tile(p, inv, scale, y, log2_l)
    bound = {torch.float32: 1e-7, torch.float64: 2e-16}[dtype] * (4 + 4 * scale)
    assert relative_error(p, torch.exp2(z - log2_l.double()) * inv.double()[:, None]) < bound


def test_of_equal_cosines_the_first_class_is_the_hardest(dtype: torch.dtype) -> None:
    dots = torch.full((9, 20), 0.25, dtype=dtype)
    dots[4] = dots[6] = 0.5
    hardest = _forward(dots, torch.ones(9, dtype=dtype), _no_labels(20), 8.0)[3]
    assert hardest.tolist() == [4] * 20


def test_a_row_of_nan_is_nan_and_its_neighbours_are_not(dtype: torch.dtype) -> None:
    dots, inv, y = _tile(17, 33, dtype)
    expected = _forward(dots, inv, y, 64.0)
    dots[:, 9] = math.nan
    got = _forward(dots, inv, y, 64.0)
    others = torch.arange(33) != 9
    assert got[2].isnan().nonzero().tolist() == [[9]]
    assert got[3][9] == -1
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[..., others], b[..., others])


def test_a_class_of_nan_makes_every_sum_nan(dtype: torch.dtype) -> None:
    dots, inv, _ = _tile(17, 33, dtype)
    dots[5] = math.nan
    _, tile_max, tile_sum, hardest = _forward(dots, inv, _no_labels(33), 64.0)
    assert bool(tile_sum.isnan().all())
    assert not tile_max.isnan().any()
    assert not (hardest == 5).any()


def test_inverse_norms_are_exact_to_rounding_and_stop_at_eps(dtype: torch.dtype) -> None:
    for rows, dim in ((1, 1), (5, 7), (4, 16), (3, 515)):
        w = (_random(rows, dim) * 10 ** _random(rows, 1, seed=2).mul(2)).to(dtype)
        w[0] = 0
        inv = torch.full((rows,), math.nan, dtype=dtype)
        native.Kernels(dtype).inverse_norms(w, inv)
        right = 1 / torch.linalg.vector_norm(w.double(), dim=1).clamp_min(1e-12)
        assert (
            float((inv.double() / right - 1).abs().max()) < {torch.float32: 1e-7, torch.float64: 1e-15}[dtype]
        )


def test_norms_do_not_overflow_in_float32() -> None:
    w = torch.full((2, 16), 1e30)
    inv = torch.empty(2)
    native.Kernels(torch.float32).inverse_norms(w, inv)
    assert inv.tolist() == pytest.approx([2.5e-31] * 2, rel=FLOAT32_QUOTIENT, abs=0)


def test_the_projection_takes_out_the_part_along_the_centre(dtype: torch.dtype) -> None:
    for rows, dim in ((1, 1), (5, 7), (4, 16), (3, 515)):
        w = (_random(rows, dim) * 0.01).to(dtype)
        acc = _random(rows, dim, seed=3).to(dtype)
        w[rows - 1] = 0  # shorter than eps: its gradient is 0
        inv = (1 / torch.linalg.vector_norm(w.double(), dim=1).clamp_min(1e-12)).to(dtype)
        wn = w.double() * inv.double()[:, None]
        right = 5 * (acc.double() - (acc.double() * wn).sum(1, keepdim=True) * wn)
        right[rows - 1] = 0
        native.Kernels(dtype).project(acc, w, inv, 5.0)
        assert float((acc.double() - right).abs().max()) < {torch.float32: 3e-5, torch.float64: 1e-13}[dtype]
        assert torch.equal(acc[rows - 1], torch.zeros(dim, dtype=dtype))


def test_nothing_outside_the_tile_is_touched(dtype: torch.dtype) -> None:
    def framed(*shape: int) -> tuple[Tensor, Tensor]:
        whole = torch.full((math.prod(shape) + 64,), 123.0, dtype=dtype)
        return whole, whole[32:-32].view(shape)

    def untouched(whole: Tensor) -> bool:
        return bool((whole[:32] == 123).all() and (whole[-32:] == 123).all())

    kernels = native.Kernels(dtype)
    for rows, batch, dim in ((1, 1, 1), (3, 7, 5), (17, 33, 19)):
        dots, inv, y = _tile(rows, batch, dtype)
        frame, inside = framed(rows, batch)
        inside.copy_(dots)
        kernels.backward_tile(inside, inv, 8.0, y, torch.zeros(batch, dtype=dtype))
        max_frame, tile_max = framed(batch)
        inside.copy_(dots)
        kernels.forward_tile(inside, inv, 8.0, y, tile_max, torch.empty(batch, dtype=torch.float64), None)
        acc_frame, acc = framed(rows, dim)
        inv_frame, inverse = framed(rows)
        w = _random(rows, dim).to(dtype)
        kernels.inverse_norms(w, inverse)
        kernels.project(acc, w, inverse, 1.0)
        assert all(untouched(f) for f in (frame, max_frame, acc_frame, inv_frame))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_a_tile_without_changing_it(threads: int, dtype: torch.dtype) -> None:
    dots, inv, y = _tile(1031, 64, dtype)  # past the size below which one thread does it all
    alone, shared = _forward(dots, inv, y, 64.0), _forward(dots, inv, y, 64.0, threads=threads)
    for i in (0, 1, 3):  # exponentials, maxima, classes: each made by one thread
        assert torch.equal(shared[i], alone[i])
    assert relative_error(shared[2], alone[2]) < {torch.float32: 1e-6, torch.float64: 1e-15}[dtype]
    assert torch.equal(_forward(dots, inv, y, 64.0, threads=threads)[2], shared[2])


def test_long_sums_in_float32_do_not_drift() -> None:
    # One running float32 sum is off by 6e-6 and more here, sums of 1024 terms joined in float64 by 1e-7.
    rows = 400_000
    cosines = (torch.sin(torch.arange(rows, dtype=torch.float64) * 0.7) / 2).float()
    tile_sum = _forward(cosines[:, None].expand(rows, 3), torch.ones(rows), _no_labels(3), 1.0)[2]
    right = torch.exp(cosines.double() - cosines.double().max()).sum()
    assert relative_error(tile_sum, right.expand(3)) < 1e-6


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="instruction set must be one of"):
        extension.use_instruction_set("x86-64-v9")


def test_an_extension_of_other_sources_is_reported_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native._load.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", ModuleType)
    try:
        assert "it lacks inverse_norms_float32" in (native.load_error() or "")
    finally:
        native._load.cache_clear()
