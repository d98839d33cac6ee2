"""The demo end to end at toy size, its errors, and the demand on quality."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples.glyphs import augment as augmentation
from examples.glyphs import demo, pictures
from examples.glyphs.augment import augment
from examples.glyphs.model import EMBEDDING_SIZE, embed, make_net
from examples.glyphs.training import Recipe, TrainingError, learning_rate, train
from examples.glyphs.verification import Scores, Verification
from expface_kernels import ExpFace, MarginSoftmaxHead
from tests.tolerances import MIDDLE_RATE, PICTURED_COSINE, SAME_TRAINING


def test_toy_demo_prints_its_figures_and_writes_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--toy", "--losses", "expface", "normface", "--out", str(tmp_path)]
    assert demo.main([*argv, "--json", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    for words in ("A toy: some seconds", "epoch 1 of 1: loss", "TAR@1e-4", "rank-1", "NormFace()", "eager"):
        assert words in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "training.png",
        "roc.png",
        "cosines.png",
        "nearest_expface.png",
        "nearest_normface.png",
        "figures.json",
    }
    pictures = {name for name in names if name.endswith(".png")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["losses"]) == {"expface", "normface"}
    assert f"{figures['losses']['expface']['tar']['0.001']:.3f}" in printed
    assert figures["heads"]["eager"]["extra_bytes"] != 0
    assert (figures["characters"], figures["fonts"], figures["test_fonts"]) == (64, 6, 4)


def _run(tar: float, rank1: float) -> demo.Run:
    """A run that verified with the given figures; nothing else of it is looked at."""
    scores = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32))
    result = Verification(scores, {1e-2: 1.0, 1e-3: tar, 1e-4: 0.0}, 1.0, rank1, {})
    return demo.Run([], pictures.Curve(1), result, torch.empty(0))


@pytest.mark.parametrize(
    ("tar", "rank1", "status", "words"),
    [
        (0.74, 0.83, 0, ""),
        (0.7399, 0.95, 1, "TAR@FAR 1e-3 0.740, expected at least 0.74"),
        (0.95, 0.829, 1, "rank-1 0.829, expected at least 0.83"),
    ],
)
def test_quality_is_demanded_of_expface(
    tar: float, rank1: float, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.quality_status({"expface": _run(tar, rank1)}, Recipe()) == status
    assert words in capsys.readouterr().err


def test_a_poor_model_ends_the_demo_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = demo.make_plan
    # the toy's sizes, but held to the full demo's quality
    monkeypatch.setattr(demo, "make_plan", lambda options: replace(plan(options), demanding=True))
    monkeypatch.setattr(demo, "measure", lambda size: {})  # timing is another test's
    assert demo.main(["--toy", "--out", str(tmp_path)]) == 1
    assert "error: expface missed its quality after 1 epoch" in capsys.readouterr().err


@pytest.fixture
def images() -> torch.Tensor:
    """(96, 1, 32, 32) uint8: six classes, each a bright square in its own place."""
    x = torch.zeros((96, 1, 32, 32), dtype=torch.uint8)
    for i in range(96):
        row, column = divmod(i % 6, 3)
        x[i, 0, 4 + 14 * row : 14 + 14 * row, 1 + 10 * column : 11 + 10 * column] = 255
    return x


def _train(images: torch.Tensor, recipe: Recipe) -> Iterator[tuple[float, float]]:
    net = make_net(0)
    head = MarginSoftmaxHead(EMBEDDING_SIZE, 6, ExpFace(), scale=32.0, backend="cpu")
    for record in train(net, head, images, torch.arange(96) % 6, recipe):
        yield record.loss, record.target_angle


def test_training_learns_and_repeats_itself(images: torch.Tensor) -> None:
    recipe = Recipe(epochs=4, batch=32, seed=5)
    first, second = list(_train(images, recipe)), list(_train(images, recipe))
    assert len(first) == 4
    assert first[-1][0] < 0.5 * first[0][0]
    assert first[-1][1] < first[0][1]
    np.testing.assert_allclose(first, second, rtol=SAME_TRAINING)


def test_training_reports_every_step(images: torch.Tensor) -> None:
    net, head = make_net(0), MarginSoftmaxHead(EMBEDDING_SIZE, 6, ExpFace(), scale=32.0, backend="cpu")
    steps = []
    list(train(net, head, images, torch.arange(96) % 6, Recipe(epochs=2, batch=40), steps.append))
    assert [(step.epoch, step.number, step.of) for step in steps] == [
        (1, 1, 4),
        (1, 2, 4),
        (2, 3, 4),
        (2, 4, 4),
    ]
    assert len(set(steps[0].rows.tolist() + steps[1].rows.tolist())) == 80  # no image twice in an epoch


def test_training_refuses_less_than_a_batch(images: torch.Tensor) -> None:
    with pytest.raises(TrainingError, match="expected at least one batch of 256, got 96"):
        next(_train(images, Recipe()))


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 1368, Recipe()) for step in range(1368)]
    assert rates[0] == pytest.approx(0.07 / 137)
    assert rates[136] == pytest.approx(0.07)
    assert rates[137] == pytest.approx(0.07)
    assert rates[752] == pytest.approx(0.035, abs=MIDDLE_RATE)
    assert 0 < rates[-1] < 1e-6


def test_augmentation_keeps_glyphs_recognisable_and_changes_each() -> None:
    x = torch.zeros((4, 1, 32, 32))
    x[:, :, 8:24, 14:18] = 1
    generator = torch.Generator().manual_seed(0)
    first = augment(x, generator)
    assert first.shape == x.shape
    assert not torch.equal(first[0], first[1])
    assert first[:, :, 12:20, 15:17].mean() > 0.4  # the bar is still there
    assert first[:, :, :, :4].abs().mean() < 0.2  # and not all over the place


def test_augmentation_pools_and_bends_as_torch_does() -> None:
    x = torch.randn((3, 1, 32, 32))
    torch.testing.assert_close(augmentation._pool3(x, torch.maximum, -math.inf), F.max_pool2d(x, 3, 1, 1))
    torch.testing.assert_close(augmentation._pool3(x, torch.add, 0.0) / 9, F.avg_pool2d(x, 3, 1, 1))
    affine, coarse = torch.randn((3, 2, 3)), torch.randn((3, 2, 5, 5))
    grid = torch.cat((affine, coarse.flatten(2)), dim=2) @ augmentation._grid_basis(32, 32)
    expected = F.affine_grid(affine, [3, 1, 32, 32], align_corners=False).permute(0, 3, 1, 2)
    expected = expected + F.interpolate(coarse, (32, 32), mode="bicubic", align_corners=True)
    torch.testing.assert_close(grid.view(3, 2, 32, 32), expected)


def test_net_has_the_published_size_and_embeds_to_unit_length() -> None:
    net = make_net(1)
    assert sum(parameter.numel() for parameter in net.parameters()) == 360_048
    e = embed(net, torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8))
    assert e.shape == (5, 3, 128)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(5, 3))
    assert net.training


def test_same_seed_makes_the_same_net_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    a, b, other = make_net(1), make_net(1), make_net(2)
    assert torch.equal(a.embed.weight, b.embed.weight)
    assert not torch.equal(a.embed.weight, other.embed.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nearest_glyphs_are_sorted_and_in_other_fonts() -> None:
    generator = torch.Generator().manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn((20, 4, 8), generator=generator), dim=-1)
    rows = pictures.nearest_glyphs(e, queries=8, nearest=5)
    assert {row.query[1] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert row.cosines == sorted(row.cosines, reverse=True)
        for place, cosine in zip(row.found, row.cosines, strict=True):
            assert place[1] != row.query[1]
            assert cosine == pytest.approx(float(e[row.query] @ e[place]), abs=PICTURED_COSINE)
