"""The label-noise study's heads, and what is recorded of an epoch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from examples.glyphs.training import EpochRecord, Step
from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead, SphereFace
from lab import plan
from lab.heads import SLOPE_OF_COSINE, Floored, follow_schedule, make_head, slope
from lab.recorder import BIN_DEGREES, EpochRecorder
from tests.tolerances import CENTRAL_DIFFERENCE, CLOSED_FORM, SIX_DIGITS

ANGLES = torch.linspace(0.02, math.pi - 0.02, 200, dtype=torch.float64)


def test_a_floored_slope_is_the_steeper_of_the_margins_and_the_cosines() -> None:
    phi = math.pi * (ANGLES / math.pi) ** 0.7
    exact = -0.7 * (ANGLES / math.pi) ** -0.3 * torch.sin(phi)
    expected = torch.minimum(exact, -torch.sin(ANGLES))
    torch.testing.assert_close(
        slope(Floored(ExpFace(0.7)), ANGLES, "exact"), expected, rtol=CLOSED_FORM, atol=0
    )
    assert (expected == exact).any()
    assert (expected < exact).any()


def test_a_floored_margin_keeps_its_value_and_never_pushes_away() -> None:
    for margin in (ArcFace(0.5), ExpFace(0.7), CosFace(0.35)):
        torch.testing.assert_close(
            Floored(margin)(ANGLES), margin(ANGLES), rtol=CLOSED_FORM, atol=CLOSED_FORM
        )
        assert bool((slope(Floored(margin), ANGLES, "exact") <= -torch.sin(ANGLES)).all())
    assert bool((slope(ArcFace(0.5), ANGLES, "exact") > 0).any())  # which plain ArcFace does near π


@pytest.mark.parametrize(
    ("name", "m"), dict.fromkeys((name, m) for name, trials in plan.TRIALS.items() for m, _ in trials)
)
def test_slopes_are_those_that_training_takes(name: str, m: float | None) -> None:
    """At every m that is trained: at m = 1 ExpFace and SphereFace are cos θ, where exact equals detached."""
    margin = make_head(name, "exact", m, 8.0, 3, seed=0).margin
    step, (relative, absolute) = 1e-6, CENTRAL_DIFFERENCE
    angles = ANGLES
    if isinstance(margin, SphereFace):  # its slope has a kink at π/m
        angles = ANGLES[(ANGLES - math.pi / float(margin.m)).abs() > 10 * step]
    detached, exact = slope(margin, angles, "detached"), slope(margin, angles, "exact")
    torch.testing.assert_close(detached, -torch.sin(angles), rtol=CLOSED_FORM, atol=0)
    difference = (margin(angles + step) - margin(angles - step)) / (2 * step)
    torch.testing.assert_close(exact, difference, rtol=relative, atol=absolute)
    same = torch.allclose(exact, detached, rtol=relative, atol=absolute)
    assert same == (name in SLOPE_OF_COSINE)  # where they are the same, a swap would go unseen


@pytest.mark.parametrize(
    ("mode", "gradients", "scales"),
    [
        ("detached", "dddd", (32, 32, 32, 32)),
        ("exact", "eeee", (32, 32, 32, 32)),
        ("floored", "eeee", (32, 32, 32, 32)),
        ("later", "ddee", (32, 32, 32, 32)),
        ("rising", "eeee", (8, 20, 32, 32)),
        ("detached-rising", "dddd", (8, 20, 32, 32)),
    ],
)
def test_schedules_change_what_they_say_and_when(
    mode: str, gradients: str, scales: tuple[float, ...]
) -> None:
    head = make_head("expface", mode, 0.7, 32.0, 5, seed=0)
    assert isinstance(head.margin, Floored) == (mode == "floored")
    for done, gradient, scale in zip((0.0, 0.25, 0.5, 0.9), gradients, scales, strict=True):
        follow_schedule(head, mode, 32.0, done)
        assert (head.target_gradient[0], head.scale) == (gradient, scale)


# What is recorded


def brute_force(
    head: MarginSoftmaxHead, x: torch.Tensor, y: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Angle in degrees, |∂loss/∂θ| and s·q of each row, from all logits in float64."""
    cosines = (
        torch.nn.functional.normalize(x.double())
        @ torch.nn.functional.normalize(head.weight.detach().double()).T
    )
    theta = torch.arccos(cosines.gather(1, y[:, None])[:, 0]).requires_grad_()
    inside = head.margin(theta.detach()) + torch.cos(theta) - torch.cos(theta).detach()
    psi = head.margin(theta) if mode == "exact" else inside
    logits = head.scale * cosines.scatter(1, y[:, None], 0.0)
    logits = torch.where(
        torch.nn.functional.one_hot(y, len(head.weight)).bool(), head.scale * psi[:, None], logits
    )
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    (pull,) = torch.autograd.grad(loss, theta)
    q = 1 - torch.softmax(logits.detach(), 1).gather(1, y[:, None])[:, 0]
    return torch.rad2deg(theta.detach()), pull.abs(), head.scale * q


@pytest.mark.parametrize("mode", ["detached", "exact"])
def test_an_epoch_is_recorded_as_a_brute_force_pass_finds_it(mode: str) -> None:
    head = make_head("arcface", mode, 0.5, 8.0, 12, seed=1)
    is_noisy = torch.arange(90) % 4 == 0
    recorder = EpochRecorder(is_noisy)
    x, y = torch.randn((90, 128)) + 0.1, torch.randint(12, (90,))
    order = torch.randperm(90)
    for number, rows in enumerate(order.split(30), 1):
        loss, stats = head(x[rows], y[rows], return_stats=True)
        recorder.add(Step(1, number, 3, loss.item(), 0.0, rows, stats), head)
    found = recorder.close(EpochRecord(1, 2.5, 80.0, 1.0, 1.0))
    angle, pull, push = brute_force(head, x, y, mode)
    assert found["gradient_share"] == pytest.approx(float(pull[is_noisy].sum() / pull.sum()), rel=SIX_DIGITS)
    assert found["push_share"] == pytest.approx(float(push[is_noisy].sum() / push.sum()), rel=SIX_DIGITS)
    assert found["noisy_samples"] == 23
    for group, members in (("clean", ~is_noisy), ("noisy", is_noisy)):
        values = angle[members].numpy()
        assert found[group]["angle_mean"] == pytest.approx(values.mean(), rel=SIX_DIGITS)
        assert found[group]["angle_percentiles"] == pytest.approx(
            np.percentile(values, (5, 25, 50, 75, 95)), rel=SIX_DIGITS
        )
        assert (
            found[group]["histogram"]
            == np.bincount((values // BIN_DEGREES).astype(int), minlength=45).tolist()
        )
    assert found["target_gradient"] == mode
    assert found["scale"] == 8.0
    json.dumps(found)


def test_without_noisy_samples_there_is_no_share() -> None:
    head = make_head("normface", "detached", None, 8.0, 5, seed=0)
    recorder = EpochRecorder(torch.zeros(8, dtype=torch.bool))
    _, stats = head(torch.randn(8, 128), torch.arange(8) % 5, return_stats=True)
    recorder.add(Step(1, 1, 1, 1.0, 0.0, torch.arange(8), stats), head)
    found = recorder.close(EpochRecord(1, 1.0, 0.0, 1.0, 1.0))
    assert found["gradient_share"] is None
    assert found["noisy"] is None
    assert sum(found["clean"]["histogram"]) == 8
