"""The search for wrong labels: at toy size end to end, on an easy set with a known answer, and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from examples.glyphs import find_wrong_labels, pictures
from examples.glyphs.label_noise import flip_labels
from examples.glyphs.training import Recipe
from expface_kernels import BatchStats
from expface_kernels.analysis import LabelNoiseRanker, RankingQuality


def test_the_toy_prints_its_figures_and_writes_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_wrong_labels.main(["--toy", "--out", str(tmp_path / "new"), "--suspects", "7"]) == 0
    printed = capsys.readouterr().out
    for words in ("43 of 288 images of 48 kanji in 6 fonts", "epoch 2 of 2", "watching the angles", "AUC 0."):
        assert words in printed
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["angles.png", "suspects.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def bars(classes: int, each: int) -> tuple[Tensor, Tensor]:
    """(N, 1, 32, 32) uint8 bright squares, and their class: the place of the square."""
    truth = torch.arange(classes * each) % classes
    images = torch.zeros((classes * each, 1, 32, 32), dtype=torch.uint8)
    for i, c in enumerate(truth.tolist()):
        row, column = divmod(c, 3)
        images[i, 0, 4 + 14 * row : 14 + 14 * row, 1 + 10 * column : 11 + 10 * column] = 255
    return images, truth


def test_flipped_labels_of_an_easy_set_are_found_with_their_true_classes() -> None:
    images, truth = bars(classes=6, each=48)
    labels, is_noisy = flip_labels(truth, 6, 0.15, seed=1)
    recipe = Recipe(epochs=5, batch=32, seed=1)
    found = find_wrong_labels.search(images, labels, 6, recipe, Console(quiet=True))
    quality = found.ranker.evaluate(is_noisy)
    assert quality.auc > 0.97
    assert quality.precision > 0.9
    first = found.ranker.suspects(20)
    assert (found.ranker.likely_class[first] == truth[first]).float().mean() > 0.9
    sure = find_wrong_labels.surest_of_each_class(found.ranker, labels, truth)
    assert sorted(sure) == list(range(6))
    assert all(int(labels[i]) == int(truth[i]) == c for c, i in sure.items())
    assert [angles.rows for angles in found.monitor.epochs] == [288] * 5
    assert 0 < found.watching < found.training


def test_the_sheet_shows_given_and_likely_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 32, 32)
    zeros = torch.zeros(4, dtype=torch.float64)
    angles = torch.tensor([1.9, 0.1, 0.2, 1.8], dtype=torch.float64)
    likely = torch.tensor([1, 2, 0, 2])
    ranker = LabelNoiseRanker(4)
    ranker.update(torch.arange(4), BatchStats(angles, zeros, zeros, zeros, zeros, likely, zeros > 0))
    shown: list[pictures.Suspect] = []

    def keep(path: Path, suspects: Sequence[pictures.Suspect]) -> None:
        shown.extend(suspects)

    monkeypatch.setattr(pictures, "suspect_sheet", keep)
    found = SimpleNamespace(ranker=ranker, monitor=SimpleNamespace(draw=lambda path, margins: None))
    labels, truth = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 1, 2, 0])
    find_wrong_labels._save_pictures(tmp_path, found, images, labels, truth, 2)  # type: ignore[arg-type]
    # By the least suspicious of each label: class 1 looks like image 1, class 2 like image 2, class 0 like 0.
    values = [tuple(int(picture[0, 0]) for picture in (s.image, s.given, s.likely)) for s in shown]
    assert values == [(0, 0, 1), (3, 1, 2)]
    assert [(s.is_noisy, s.is_right) for s in shown] == [(True, True), (True, False)]
    assert [round(s.score, 3) for s in shown] == [round(a - torch.pi / 2, 3) for a in (1.9, 1.8)]


def test_a_poor_ranking_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = find_wrong_labels._chosen
    monkeypatch.setattr(find_wrong_labels, "_chosen", lambda glyphs, _: toy(glyphs, True))
    poor = RankingQuality(0.97, 0.5, 43)
    monkeypatch.setattr(LabelNoiseRanker, "evaluate", lambda *_: poor)
    monkeypatch.setattr(find_wrong_labels, "_save_pictures", lambda *_: None)  # another test's
    assert find_wrong_labels.main(["--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "error: AUC 0.9700, expected at least 0.98" in capsys.readouterr().err
    assert find_wrong_labels.main(["--epochs", "1", "--toy", "--out", str(tmp_path)]) == 0


def test_without_wrong_labels_there_is_no_auc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_wrong_labels.main(["--toy", "--share", "0", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "No AUC: it takes both" in capsys.readouterr().out
