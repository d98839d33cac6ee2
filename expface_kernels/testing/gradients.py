"""Loss, dx and dw of a margin on a backend: against float64 truth, beside eager PyTorch, by the policy.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) int64 labels
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expface_kernels import backends, reference
from expface_kernels.checks import (
    FLOATS,
    LARGEST_INTEGER,
    check_choice,
    check_integer,
    check_margin,
    check_scale,
)
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES, margin_cross_entropy
from expface_kernels.margins import ExpFace, MarginFunction
from expface_kernels.options import LossOptions
from expface_kernels.testing import policy
from expface_kernels.testing.baselines import Results, backward, eager, eager_margin, leaves, truth
from expface_kernels.testing.batches import KINDS, batch
from expface_kernels.testing.differences import difference_error, frozen, slope_error

NAMES = ("loss", "dx", "dw")
DEFAULT_KINDS = ("random", "near_centre", "opposite", "learnt", "spread")
BASELINE_DRAWS = 3
"""Batches over which eager's error is taken, the worst of them: in a single one it may be small by luck."""

LossFunction = Callable[..., Tensor]
"""Called like `margin_cross_entropy`: (embeddings, weight, labels, margin, *, scale, reduction, …)."""


@dataclass(frozen=True)
class Quantity:
    """One thing that was judged. Errors are relative to the truth's norm."""

    name: str
    error: float
    eager_error: float | None
    """What same-dtype PyTorch makes; NaN where it makes NaN, None where it was not asked."""
    limit: float
    passed: bool
    row: int | None = None
    """The worst row, where rows were judged each by its own norm."""
    angle: float | None = None
    """Its target angle, or the angle at which the slope is worst; radians."""


@dataclass(frozen=True)
class BatchReport:
    """All quantities of one batch."""

    kind: str
    quantities: tuple[Quantity, ...]

    @property
    def passed(self) -> bool:
        return all(quantity.passed for quantity in self.quantities)


@dataclass(frozen=True)
class GradientReport:
    """What a gradient check found. `bool(report)` is whether the policy held everywhere."""

    setting: dict[str, Any]
    batches: tuple[BatchReport, ...]

    @property
    def passed(self) -> bool:
        return all(one.passed for one in self.batches)

    def __bool__(self) -> bool:
        return self.passed

    def failures(self) -> list[str]:
        """A line for each quantity outside its limit."""
        return [
            f"{one.kind}: {q.name} is off by {q.error:.3g}, at most {q.limit:.3g} allowed" + _place(q)
            for one in self.batches
            for q in one.quantities
            if not q.passed
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite as text ("nan", "inf")."""
        plain = {"passed": self.passed, **dataclasses.asdict(self)}
        for one in plain["batches"]:
            for quantity in one["quantities"]:
                for name, value in quantity.items():
                    if isinstance(value, float) and not math.isfinite(value):
                        quantity[name] = str(value)
        return plain


def _place(q: Quantity) -> str:
    if q.angle is None:
        return ""
    row = "" if q.row is None else f"row {q.row} "
    return f" ({row}at {math.degrees(q.angle):.4g} degrees)"


@dataclass(frozen=True)
class _Setting:
    """The arguments of `check_gradients`, checked."""

    margin: MarginFunction
    eager_margin: MarginFunction
    """As the naive loss calls it."""
    eager_psi: torch.dtype
    """What the naive loss computes psi in."""
    target_gradient: str
    scale: float
    dtype: torch.dtype
    backend: str
    device: str
    shape: tuple[int, int, int]
    seed: int
    workspace_bytes: int
    function: LossFunction | None

    @property
    def options(self) -> dict[str, Any]:
        """What the truth, eager and the function are all told."""
        return {"scale": self.scale, "target_gradient": self.target_gradient}

    def loss(self, x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, **options: Any) -> Tensor:
        """Of what is checked."""
        options = {"workspace_bytes": self.workspace_bytes, **self.options, **options}
        if self.function is not None:
            return self.function(x, w, y, margin, **options)
        loss = margin_cross_entropy(x, w, y, margin, backend=self.backend, **options)
        assert isinstance(loss, Tensor)
        return loss

    def told(self) -> dict[str, Any]:
        rows, classes, features = self.shape
        return {
            "margin": repr(self.margin),
            "eager_psi": _name(self.eager_psi),
            "target_gradient": self.target_gradient,
            "scale": self.scale,
            "dtype": _name(self.dtype),
            "backend": self.backend,
            "device": self.device,
            "rows": rows,
            "classes": classes,
            "features": features,
            "seed": self.seed,
            "workspace_bytes": self.workspace_bytes,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_gradients(
    margin: MarginFunction | None = None,
    *,
    target_gradient: str = "exact",
    scale: float = 64.0,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    device: str = "cpu",
    rows: int = 32,
    classes: int = 1031,
    features: int = 256,
    kinds: Sequence[str] = DEFAULT_KINDS,
    seed: int = 0,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    function: LossFunction | None = None,
) -> GradientReport:
    """Judge loss, dx and dw on batches that hurt; the policy is `testing.policy`.

    Args:
        margin: `theta -> psi`; None is ExpFace(0.7).
        target_gradient, scale, backend, workspace_bytes: as in `margin_cross_entropy`.
        dtype: of rows and centres; the truth is taken at their values as stored.
        device: where the backend computes; truth and differences are made on the CPU.
        rows, classes, features: B, C, D; D at least 2, since with one feature both gradients are zero and an
            error has nothing to be measured by.
        kinds: of `testing.KINDS`: "random", "near_centre", "opposite", "learnt", "spread", "mixed",
            "wrong_class".
        seed: of the batches.
        function: a loss of your own in place of `margin_cross_entropy`, called with the same arguments less
            `backend`.

    For each batch: loss, dx and dw by their norms, beside what the naive loss makes in the same dtype; the
    worst row of loss and of dx, each row by its own norm, with its target angle; and, in float64, the
    gradient against finite differences of its own loss (for "detached" of the loss whose slope it is; where
    the backend has no float64, those of the reference). For "exact" also the margin's slope against
    differences of psi, at the rows' angles and on a grid over (0, π), with the worst angle: "detached" does
    not use it.

    A margin need only take float64 angles, as the package calls it. For one that takes no others the naive
    loss computes psi in float64, and the report's setting says so ("eager_psi").

    A margin may jump or bend: rows close by are left out of the finite differences, and psi's own are taken
    from both sides.

    Raises ValueError and TypeError as `margin_cross_entropy`, RuntimeError where the backend cannot serve.
    Memory: some ten float64 tensors of (B, C).
    """
    margin = ExpFace() if margin is None else margin
    check_scale(scale)
    check_margin(margin)
    LossOptions(target_gradient=target_gradient, workspace_bytes=workspace_bytes)
    for name, value, least in (("rows", rows, 1), ("classes", classes, 1), ("features", features, 2)):
        check_integer(name, value, least)
    check_integer("seed", seed, most=LARGEST_INTEGER)
    backends.check_name(backend)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    if not kinds:
        raise ValueError(f"kinds: expected some of {KINDS}, got none")
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    like = torch.empty(0, dtype=dtype, device=device)
    name = backends.resolve(backend, like, like)
    setting = _Setting(
        margin, *eager_margin(margin, rows, dtype), target_gradient, scale, dtype, name, device,
        (rows, classes, features), seed, workspace_bytes, function,
    )  # fmt: skip
    return GradientReport(setting.told(), tuple(_check_batch(setting, kind) for kind in kinds))


def assert_gradients(margin: MarginFunction | None = None, **options: Any) -> None:
    """AssertionError with a line for each failure where `check_gradients`, same arguments, finds any."""
    report = check_gradients(margin, **options)
    assert report.passed, "\n".join(["the gradient check failed", *report.failures()])


class _Drawn(NamedTuple):
    """A batch of values that the dtype holds, as float64; the gradients of its truth come times `factor`."""

    x: Tensor
    w: Tensor
    y: Tensor
    factor: float
    truth: Results


def _drawn(setting: _Setting, kind: str, seed: int) -> _Drawn:
    x, w, y = batch(kind, *setting.shape, seed=seed)
    x, w = x.to(setting.dtype).double(), w.to(setting.dtype).double()
    loss, dx, dw = truth(x, w, y, setting.margin, reduction="none", **setting.options)
    # A power of two that brings float16 gradients into its range, as a GradScaler does.
    factor, largest = 1.0, max(float(dx.abs().max()), float(dw.abs().max()))
    if setting.dtype == torch.float16 and 0 < largest < math.inf:
        factor = 2.0 ** (8 - math.frexp(largest)[1])
    return _Drawn(x, w, y, factor, (loss, factor * dx, factor * dw))


def _check_batch(setting: _Setting, kind: str) -> BatchReport:
    drawn = _drawn(setting, kind, setting.seed)
    x, w, y = drawn.x, drawn.w, drawn.y
    a, b = (leaf.detach().to(setting.device).requires_grad_() for leaf in leaves(x, w, setting.dtype))
    loss = setting.loss(a, b, y.to(setting.device), setting.margin, reduction="none")
    got = [value.cpu() for value in backward(loss, a, b, drawn.factor)]
    made = _eager(setting, drawn)

    # A loss is computed and handed out in float32 at least.
    dtypes = (torch.promote_types(setting.dtype, torch.float32), setting.dtype, setting.dtype)
    quantities = []
    for i, (name, eager_error) in enumerate(zip(NAMES, _baseline(setting, kind), strict=True)):
        verdict = policy.judge(got[i], drawn.truth[i], eager=eager_error, dtype=dtypes[i])
        quantities.append(Quantity(name, verdict.error, eager_error, verdict.limit, verdict.passed))
    theta = reference.pair_angle(x, w[y]).detach()
    for i, name in enumerate(NAMES[:2]):
        values = (got[i], drawn.truth[i], made[i])
        quantities.append(_worst_row(name, setting, values, dtypes[i], theta))
    return BatchReport(kind, (*quantities, *_differences(setting, x, w, y), *_slope(setting, theta)))


def _eager(setting: _Setting, drawn: _Drawn) -> Results:
    x, w, y, factor, _ = drawn
    options = {"factor": factor, "reduction": "none", **setting.options}
    return eager(x, w, y, setting.eager_margin, dtype=setting.dtype, **options)


def _baseline(setting: _Setting, kind: str) -> tuple[float | None, ...]:
    """Return eager's worst errors of loss, dx, dw over some batches; None for the reference: it is eager."""
    if setting.backend == "reference" and setting.function is None:
        return None, None, None
    worst = [0.0, 0.0, 0.0]
    for draw in range(BASELINE_DRAWS):
        drawn = _drawn(setting, kind, setting.seed + draw)
        errors = map(policy.relative_error, _eager(setting, drawn), drawn.truth)
        worst = [
            error if math.isnan(error) else max(old, error) for old, error in zip(worst, errors, strict=True)
        ]
    return tuple(worst)


def _worst_row(
    name: str, setting: _Setting, values: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, theta: Tensor
) -> Quantity:
    """values: what was computed, the truth, what eager makes."""
    got, right, made = values
    cap, smallest = policy.row_cap(setting.scale, dtype), policy.smallest_row(dtype)
    verdict = policy.judge_rows(got, right, cap=cap, smallest=smallest)
    row = verdict.row
    errors = policy.judge_rows(made, right, cap=cap, smallest=smallest).errors
    return Quantity(
        f"{name}, worst row", verdict.error, float(errors[row]), cap, verdict.passed, row, float(theta[row])
    )


def _differences(setting: _Setting, x: Tensor, w: Tensor, y: Tensor) -> tuple[Quantity, ...]:
    """Nothing where every row of the batch is at a cone or at a bend of psi."""
    margin, own = setting.margin, setting
    if setting.backend == "triton" and setting.function is None:
        own = dataclasses.replace(setting, backend="reference")
    a, b = leaves(x, w, torch.float64)
    _, dx, dw = backward(own.loss(a, b, y, margin, reduction="sum"), a, b)
    sloped = frozen(margin, x, w, y) if setting.target_gradient == "detached" else margin

    def loss(x: Tensor, w: Tensor, margin: MarginFunction) -> Tensor:
        return own.loss(x, w, y, margin, reduction="sum", target_gradient="exact").detach()

    error = difference_error(loss, x, w, y, sloped, dx, dw, setting.scale)
    if error is None:
        return ()
    limit = policy.FINITE_DIFFERENCES
    return (Quantity("finite differences", error, None, limit, error <= limit),)


def _slope(setting: _Setting, theta: Tensor) -> tuple[Quantity, ...]:
    """Nothing for "detached", whose slope is that of the cosine."""
    if setting.target_gradient == "detached":
        return ()
    error, angle = slope_error(setting.margin, theta)
    limit = policy.FINITE_DIFFERENCES
    return (Quantity("margin's slope", error, None, limit, error <= limit, angle=angle),)
