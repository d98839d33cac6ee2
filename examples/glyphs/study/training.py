"""One run of the study, from its plan to the numbers that are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from bench.machine import describe

from ..dataset import Glyphs, GlyphSet
from ..model import embed, make_net
from ..training import Step, TrainingError, train
from ..verification import verify_glyphs
from .data import training_rows
from .heads import follow_schedule, make_head
from .plan import CHOICE, Configuration, Run
from .recorder import EpochRecorder


def train_run(
    glyphs: Glyphs, configuration: Configuration, run: Run, on_step: Callable[[Step], None]
) -> dict[str, Any]:
    """Train and judge `run`: a choice on validation, a final run on test, neither ever on both.

    `glyphs` has the evaluated part of validation and test. A training that diverges is a result too: "failed"
    says how, and there is no score. "seconds" are a core's: processor time of this process, of one thread in
    a worker; waiting or being stopped does not count. Runs of earlier commits have the wall clock's there.
    """
    start, machine = time.process_time(), describe()
    rows = training_rows(glyphs.train, configuration, run)
    recipe = configuration.choice_recipe if run.stage == CHOICE else configuration.recipe
    net = make_net(run.seed)
    head = make_head(run.margin, run.mode, run.m, run.scale, rows.num_classes, run.seed)
    recorder = EpochRecorder(rows.is_noisy)

    def after(step: Step) -> None:
        recorder.add(step, head)
        follow_schedule(head, run.mode, run.scale, step.number / step.of)
        on_step(step)

    epochs, failed = [], None
    try:
        for record in train(net, head, rows.images, rows.labels, replace(recipe, seed=run.seed), after):
            epochs.append(recorder.close(record))
    except TrainingError as error:
        failed = str(error)
    name, judged = ("validation", glyphs.validation) if run.stage == CHOICE else ("test", glyphs.test)
    result = None if failed else _score(embed(net, judged.images), judged)
    return {
        "judged_on": name,
        "failed": failed,
        "result": result,
        "epochs": epochs,
        "seconds": round(time.process_time() - start, 1),
        "machine": machine,
    }


def _score(e: Tensor, judged: GlyphSet) -> dict[str, Any]:
    verification = verify_glyphs(e, judged.fonts)
    return {
        "tar": {f"{far:g}": verification.tar[far] for far in verification.tar},
        "auc": verification.auc,
        "rank1": verification.rank1,
    }
