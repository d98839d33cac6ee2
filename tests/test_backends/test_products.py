"""Matrix products of the cpu backend: both libraries, whichever one this machine would take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expface_kernels.backends import cpu, products
from expface_kernels.backends.products import MM, ONEDNN, Products
from expface_kernels.testing import KINDS, assert_gradients
from tests.tolerances import SUM_ORDER

F32, F64 = torch.float32, torch.float64
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
LIBRARIES = [MM, pytest.param(ONEDNN, marks=needs_onednn)]


@pytest.fixture(autouse=True)
def _no_product_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 1)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda found: found.name)
@pytest.mark.parametrize("sizes", [(5, 3, 7), (1, 1, 1), (33, 64, 17), (0, 3, 2), (3, 0, 2), (3, 2, 0)])
@pytest.mark.parametrize("transposed", ["neither", "a", "b", "both"])
def test_a_product_lands_where_it_was_asked_for(
    library: Products, sizes: tuple[int, int, int], transposed: str
) -> None:
    rows, inner, columns = sizes
    a = torch.randn(inner, rows).T if transposed in ("a", "both") else torch.randn(rows, inner)
    b = torch.randn(columns, inner).T if transposed in ("b", "both") else torch.randn(inner, columns)
    around = torch.full((rows + 2, columns), torch.nan)
    out = around[1:-1]
    assert library.mm(a, b, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=SUM_ORDER, atol=SUM_ORDER * inner)
    assert around[[0, -1]].isnan().all()


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda found: found.name)
@pytest.mark.parametrize("workspace_bytes", [0, 2**30])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_gradients_are_right_with_either(
    library: Products, workspace_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "TILE_CLASSES", (16, 16))
    used: list[str] = []
    mm = Products.mm

    def counted(self: Products, *args: Tensor, **out: Tensor) -> Tensor:
        used.append(self.name)
        return mm(self, *args, **out)

    monkeypatch.setattr(Products, "mm", counted)
    with products.using(library):
        assert_gradients(
            backend="cpu", dtype=dtype, kinds=KINDS, rows=12, classes=45, features=24,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip
    assert library.name in used  # float64 differences are torch.mm's


def test_only_float32_has_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(products, "_amd_avx512", lambda there=there: there)
        assert products.of(F32) is (ONEDNN if there else MM)
        assert products.of(F64) is MM
    with products.using(ONEDNN):
        assert products.of(F32) is ONEDNN
        assert products.of(F64) is MM
    assert products.of(F32) is MM
