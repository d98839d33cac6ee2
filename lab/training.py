"""Trains one run of the study, from its plan to the numbers that are kept.

N images
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bench.machine import describe
from examples.glyphs.dataset import Glyphs, GlyphSet
from examples.glyphs.label_noise import flip_labels, replace_images
from examples.glyphs.model import embed, make_net
from examples.glyphs.training import Step, TrainingError, train
from examples.glyphs.verification import verify_glyphs

from .heads import follow_schedule, make_head
from .plan import CONDITIONS, TUNING, Configuration, Run
from .recorder import EpochRecorder


@dataclass(frozen=True)
class Samples:
    """Holds what one run trains on: images (N, 1, 32, 32) uint8, labels (N,) int64, is_noisy (N,) bool.

    A sample is noisy where its image is not of the class that its label names.
    """

    images: Tensor
    labels: Tensor
    is_noisy: Tensor
    num_classes: int


def training_samples(train: GlyphSet, configuration: Configuration, run: Run) -> Samples:
    """Return the first characters of the set, with the noise of the run's condition.

    The noise depends on condition and seed, not on the head: all heads are compared on the same samples.
    """
    classes = configuration.tuning_characters if run.stage == TUNING else configuration.characters
    condition = CONDITIONS[run.condition]
    known = train.subset(classes, configuration.fonts)
    if condition.kind == "open-set":
        count, skip = configuration.open_set_characters, configuration.characters
        open_set = train.subset(count, configuration.fonts, skip)
        return Samples(*replace_images(known, open_set, condition.share, run.seed), classes)
    images, labels = known.samples()
    return Samples(images, *flip_labels(labels, classes, condition.share, run.seed), classes)


def train_run(glyphs: Glyphs, configuration: Configuration, run: Run) -> dict[str, Any]:
    """Train `run` and evaluate it: tuning on validation, all other stages on test, none on both.

    A diverged training is a result too: "failed" says how, and "result" is None. "seconds" is the processor
    time of this process, which has one thread in a worker: time spent waiting or stopped does not count.
    (The first committed runs measured wall-clock time.)
    """
    start, machine = time.process_time(), describe()
    samples = training_samples(glyphs.train, configuration, run)
    recipe = configuration.tuning_recipe if run.stage == TUNING else configuration.recipe
    net = make_net(run.seed)
    head = make_head(run.margin, run.mode, run.m, run.scale, samples.num_classes, run.seed)
    recorder = EpochRecorder(samples.is_noisy)

    def after(step: Step) -> None:
        recorder.add(step, head)
        follow_schedule(head, run.mode, run.scale, step.number / step.of)

    epochs, failed = [], None
    try:
        for record in train(net, head, samples.images, samples.labels, replace(recipe, seed=run.seed), after):
            epochs.append(recorder.close(record))
    except TrainingError as error:
        failed = str(error)
    name, evaluated = ("validation", glyphs.validation) if run.stage == TUNING else ("test", glyphs.test)
    return {
        "evaluated_on": name,
        "failed": failed,
        "result": None if failed else _scores(embed(net, evaluated.images), evaluated),
        "epochs": epochs,
        "seconds": round(time.process_time() - start, 1),
        "machine": machine,
    }


def _scores(e: Tensor, evaluated: GlyphSet) -> dict[str, Any]:
    verification = verify_glyphs(e, evaluated.fonts)
    tar = {f"{far:g}": value for far, value in verification.tar.items()}
    return {"tar": tar, "auc": verification.auc, "rank1": verification.rank1}
