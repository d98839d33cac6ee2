"""Flip 15% of the labels of a glyph set, train once, and find the flipped ones by their angles.

    python -m examples.glyphs.find_wrong_labels          # 1 to 3 minutes on 2 cores, pictures in out/
    python -m examples.glyphs.find_wrong_labels --toy    # some seconds: does it run?

The exit status is 0 only if the ranking reached the AUC below (not asked of --toy).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import examples.glyphs  # noqa: F401, I001 - before torch, for OMP_WAIT_POLICY

import torch
from rich.console import Console
from torch import Tensor

from examples.glyphs import pictures
from examples.glyphs.arguments import Parser, failed, make_folder, positive_integer, seed
from examples.glyphs.dataset import COMPACT_FILE, DataError, GlyphSet, load
from examples.glyphs.label_noise import flip_labels
from examples.glyphs.model import EMBEDDING_SIZE, make_net
from examples.glyphs.training import Recipe, Step, TrainingError, train
from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead
from expface_kernels.analysis import AngularMonitor, LabelNoiseRanker, RankingQuality

SCALE = 32.0
AUC_NEEDED = 0.98
CHARACTERS, EPOCHS = 2000, 6
FONTS = (
    "notosans", "bizudg", "cedar", "umetgo", "notoserifB", "bizudm", "kaisei", "hana", "lxgw", "seto", "yoz",
    "stick",
)  # fmt: skip
TOY_CHARACTERS, TOY_FONTS = 48, 6


@dataclass(frozen=True)
class Found:
    """Holds what a run leaves: ranker, monitor, and the seconds that both took and that training took."""

    ranker: LabelNoiseRanker
    monitor: AngularMonitor
    watching: float
    training: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; 1 where training failed or the AUC is too low; 2 for bad input."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        glyphs = _chosen(load(options.data).train, options.toy)
        images, truth = glyphs.samples()
        classes = len(glyphs.characters)
        labels, is_noisy = flip_labels(truth, classes, options.share, options.seed)
        make_folder("--out", options.out)
    except (DataError, ValueError) as error:
        return failed(error, 2)
    recipe = Recipe(epochs=options.epochs or (2 if options.toy else EPOCHS), seed=options.seed)
    if options.toy:
        recipe = Recipe(epochs=recipe.epochs, batch=64, seed=recipe.seed)
    console.print(
        f"{int(is_noisy.sum()):,} of {len(images):,} images of {classes:,} kanji in {len(glyphs.fonts)} "
        f"fonts get a wrong label. Training for {recipe.epochs} epochs with ExpFace, scale {SCALE:g}."
    )
    try:
        found = search(images, labels, classes, recipe, console)
    except TrainingError as error:
        return failed(error, 1)
    quality = _report(console, found, is_noisy)
    _save_pictures(options.out, found, images, labels, truth, options.suspects)
    console.print(f"The top {options.suspects} suspects: {options.out / 'suspects.png'}")
    if quality is not None and quality.auc < AUC_NEEDED and not options.toy:
        return failed(f"AUC {quality.auc:.4f}, expected at least {AUC_NEEDED}", 1)
    return 0


def _parser() -> Parser:
    parser = Parser(description="Find wrong labels by their angles, in one training.")
    parser.add_argument(
        "--share", type=float, default=0.15, help="of labels to flip, in [0, 1) (default 0.15)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of noise, network, head, order (default 0)")
    parser.add_argument("--epochs", type=positive_integer, help=f"default {EPOCHS}")
    parser.add_argument("--suspects", type=positive_integer, default=72, help="to draw (default 72)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures (default out)")
    parser.add_argument(
        "--data", type=Path, default=COMPACT_FILE, help="another .npz of lab/build_dataset.py"
    )
    parser.add_argument("--toy", action="store_true", help="a tiny subset, no demand on quality")
    return parser


def _chosen(glyphs: GlyphSet, toy: bool) -> GlyphSet:
    """Select the characters and fonts to train on."""
    fonts = FONTS[:TOY_FONTS] if toy else FONTS
    characters = TOY_CHARACTERS if toy else CHARACTERS
    missing = set(fonts) - set(glyphs.fonts)
    if missing:
        raise DataError(f"the data has no images in the fonts {', '.join(sorted(missing))}")
    columns = [glyphs.fonts.index(font) for font in fonts]
    return GlyphSet(
        glyphs.images[:characters, columns],
        glyphs.present[:characters, columns],
        glyphs.characters[:characters],
        fonts,
    )


def search(images: Tensor, labels: Tensor, classes: int, recipe: Recipe, console: Console) -> Found:
    """Train on images (N, 1, 32, 32) with labels (N,), watching every step. Raises TrainingError."""
    net = make_net(recipe.seed)
    head = MarginSoftmaxHead(EMBEDDING_SIZE, classes, ExpFace(), scale=SCALE, backend="cpu", seed=recipe.seed)
    ranker, monitor = LabelNoiseRanker(len(images)), AngularMonitor()
    watching = 0.0

    def watch(step: Step) -> None:
        nonlocal watching
        start = time.perf_counter()
        ranker.update(step.rows, step.stats)
        monitor.update(step.stats)
        watching += time.perf_counter() - start

    start = time.perf_counter()
    for record in train(net, head, images, labels, recipe, watch):
        angles = monitor.end_epoch()
        console.print(
            f"epoch {record.epoch} of {recipe.epochs}: loss {record.loss:.2f}, mean target angle "
            f"{record.target_angle:.1f}°, nearest to their own class {angles.accuracy:.1%}, "
            f"{record.images_per_second:,.0f} images/s"
        )
    return Found(ranker, monitor, watching, time.perf_counter() - start)


def _report(console: Console, found: Found, is_noisy: Tensor) -> RankingQuality | None:
    """Print how well the flipped labels were found; None where none, or all, of the samples seen are."""
    console.print(
        f"Trained for {found.training:.0f} s, {found.watching / found.training:.2%} of it watching the angles"
    )
    try:
        quality = found.ranker.evaluate(is_noisy)
    except ValueError:
        console.print("No AUC: it takes both clean and noisy labels")
        return None
    precisions = [f"{quality.precision:.3f} of the first {quality.k:,}"]
    precisions += [
        f"{found.ranker.evaluate(is_noisy, k).precision:.3f} of the first {k}"
        for k in (100, 1000)
        if k < quality.k
    ]
    console.print(f"AUC {quality.auc:.4f}; flipped are {', '.join(precisions)}")
    return quality


def _save_pictures(
    out: Path, found: Found, images: Tensor, labels: Tensor, truth: Tensor, count: int
) -> None:
    """Save the sheet of suspects, and the angles of the last epoch."""
    sure = surest_of_each_class(found.ranker, labels, truth)
    blank = torch.zeros_like(images[0, 0])
    scores, likely = found.ranker.scores, found.ranker.likely_class
    suspects = []
    for i in found.ranker.ranking()[:count].tolist():
        given, guess, true = int(labels[i]), int(likely[i]), int(truth[i])
        suspect = pictures.Suspect(
            image=images[i, 0],
            given=images[sure[given], 0] if given in sure else blank,
            likely=images[sure[guess], 0] if guess in sure else blank,
            score=float(scores[i]),
            is_noisy=given != true,
            is_right=guess == true,
        )
        suspects.append(suspect)
    pictures.suspect_sheet(out / "suspects.png", suspects)
    found.monitor.draw(out / "angles.png", [ExpFace(), ArcFace(), CosFace()])


def surest_of_each_class(ranker: LabelNoiseRanker, labels: Tensor, truth: Tensor) -> dict[int, int]:
    """Map each class to its least suspicious clean sample, as a picture of the class."""
    ranking = ranker.ranking()
    ranking = ranking[(labels == truth)[ranking]]
    # From the most suspicious on: the last one stays.
    return dict(zip(labels[ranking].tolist(), ranking.tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
