"""log l of every backend by itself, and the probabilities that its backward makes of it.

B rows · C classes · D features
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expface_kernels.options import LossOptions
from expface_kernels.pipeline import negatives
from tests.cases import batch, device_of
from tests.tolerances import LOG_SUM, PROBABILITY_SUM

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KEEP = 2**28


def _log_l(
    x: Tensor, w: Tensor, y: Tensor, backend: str, scale: float, workspace_bytes: int = 0
) -> tuple[Tensor, Tensor]:
    """(log l (B,), the gradient of its sum in x (B, D)), on the CPU."""
    device = device_of(backend)
    a, b = (t.detach().to(device, copy=True).requires_grad_() for t in (x, w))
    counted = torch.ones(len(y), dtype=torch.bool, device=device)
    options = LossOptions(scale=scale, workspace_bytes=workspace_bytes, backend=backend)
    n = negatives(a, b, y.to(device), counted, None, options)
    n.log_l.sum().backward()
    assert a.grad is not None
    return n.log_l.detach().cpu(), a.grad.cpu()


def _unit(t: Tensor) -> Tensor:
    return t.double() / torch.linalg.vector_norm(t.double(), dim=1, keepdim=True)


@pytest.mark.parametrize("scale", [16.0, 64.0, 128.0])
@pytest.mark.parametrize("kind", ["random", "mixed", "learnt", "near_centre", "opposite"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_log_l_is_right_to_a_rounding_of_the_logits(
    dtype: torch.dtype, kind: str, scale: float, backend: str
) -> None:
    x, w, y = batch(kind, 21, 203, 40)
    x, w = x.to(dtype), w.to(dtype)
    logits = (scale * _unit(x) @ _unit(w).T).scatter(1, y[:, None], -torch.inf)
    got, _ = _log_l(x, w, y, backend, scale)
    torch.testing.assert_close(got, torch.logsumexp(logits, 1), rtol=0, atol=scale * LOG_SUM)


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_the_probabilities_of_a_row_add_up_to_1(workspace_bytes: int, backend: str) -> None:
    """Also where log l is so large that rounding it to float32 would move them all by 2e-6.

    All unit centres have `common` along the second axis, on which the rows are 0: a row's gradient along it
    is s·common·Σp/|x|.
    """
    if backend == "reference":
        pytest.skip("in plain PyTorch log l is float32")
    rows, classes, scale, common = 40, 300, 64.0, 0.25
    generator = torch.Generator().manual_seed(0)
    beside = _unit(torch.randn(classes, 62, generator=generator)) * 0.3
    first = torch.full((classes, 1), (1 - 0.3**2 - common**2) ** 0.5, dtype=torch.float64)
    w = torch.cat([first, torch.full_like(first, common), beside], 1)
    x = torch.cat(
        [torch.ones(rows, 1), torch.zeros(rows, 1), torch.randn(rows, 62, generator=generator) / 40], 1
    )
    x, w = x.float(), w.float()
    log_l, dx = _log_l(x, w, torch.zeros(rows, dtype=torch.long), backend, scale, workspace_bytes)
    assert float(log_l.min()) > 44  # log2 l above 64, where float32 numbers lie 7.6e-6 apart
    total = dx[:, 1].double() * torch.linalg.vector_norm(x.double(), dim=1) / (scale * float(w[1, 1]))
    assert float((total - 1).square().mean().sqrt()) < PROBABILITY_SUM
