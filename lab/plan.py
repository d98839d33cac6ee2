"""The plan of the noise study: conditions, heads, settings, seeds, schedules, and the names of its runs.

`Configuration` and `Run` hold what differs between studies and between runs, and are stored with the results.
What decides a result but is constant in the code is not stored: `CONDITIONS` here, the schedules of heads.py,
the network and the augmentation of examples.glyphs, how runs train and are evaluated. Raise `SCHEMA`
(results.py) when you change any of it; otherwise results from before and after would mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from examples.glyphs.dataset import COMPACT_FILE, Glyphs, checksum_file
from examples.glyphs.training import Recipe

from .heads import MARGINS, MODES, SLOPE_OF_COSINE

TUNING, FINAL, REMEDY, FOLLOWUP = "tuning", "final", "remedy", "followup"
TUNED_AT = "0.001"  # FAR of the true accept rate that decides


class StudyError(RuntimeError):
    """Says why the study cannot continue: other configuration, missing runs, damaged file, bad options."""


@dataclass(frozen=True)
class Condition:
    """Describes the noise of a training set: none ("clean"), "flipped" labels or "open-set" images.

    `tuned_under` names the condition under which a head's m and s are tuned for it: one tunes on data like
    one's own.
    """

    title: str
    kind: str
    share: float
    tuned_under: str


CONDITIONS = {
    "clean": Condition("clean", "clean", 0.0, "clean"),
    "flip15": Condition("15% flipped", "flipped", 0.15, "flip30"),
    "flip30": Condition("30% flipped", "flipped", 0.30, "flip30"),
    "open30": Condition("30% open-set", "open-set", 0.30, "flip30"),
}
Head = tuple[str, str]  # margin, mode
HEADS: tuple[Head, ...] = tuple(
    (margin, mode)
    for margin in MARGINS
    for mode in (("detached",) if margin in SLOPE_OF_COSINE else ("detached", "exact"))
)
SEEDS, QUICK_SEEDS = (0, 1, 2), (0, 1)

# The grid of m (None where a margin has none) and s, of one size for every head. In short probes low scales
# won with noisy labels, middle ones with clean labels; 32 lost with both.
Setting = tuple[float | None, float]
SCALES = (8.0, 14.0, 24.0)
TRIALS: dict[str, tuple[Setting, ...]] = {
    "normface": tuple((None, scale) for scale in (6.0, 8.0, 11.0, 14.0, 19.0, 24.0)),
    "sphereface": tuple((m, scale) for m in (1.3, 1.5) for scale in SCALES),
    "cosface": tuple((m, scale) for m in (0.2, 0.35) for scale in SCALES),
    "arcface": tuple((m, scale) for m in (0.3, 0.5) for scale in SCALES),
    "expface": tuple((m, scale) for m in (0.7, 0.8) for scale in SCALES),
}
Tuned = Mapping[tuple[Head, str], Setting]  # head, the condition under which it was tuned

# The remedies series, not at the tuned m and s but where exact heads were seen to drift: at the published
# margins, the demo's scale and 30% flipped labels; as a control also on clean labels.
PUBLISHED: dict[str, Setting] = {"arcface": (0.5, 32.0), "expface": (0.7, 32.0)}
REMEDIES: tuple[Head, ...] = tuple((margin, mode) for margin in PUBLISHED for mode in MODES)
REMEDY_CONDITION = "flip30"
DRIFT_CONTROLS = tuple((margin, mode) for margin in PUBLISHED for mode in ("detached", "exact"))

# Added when the runs on test were known: heads that were tuned to another scale than ExpFace's, at its scale
# and the better m there; and exact ArcFace at the m that has about the slope of ExpFace(0.7).
FOLLOWUPS: dict[tuple[str, Head], Setting] = {
    ("clean", ("normface", "detached")): (None, 14.0),
    ("clean", ("cosface", "detached")): (0.2, 14.0),
    ("clean", ("arcface", "exact")): (0.5, 14.0),
    **{(c, ("sphereface", "exact")): (1.5, 8.0) for c in ("flip15", "flip30", "open30")},
    ("flip30", ("arcface", "exact")): (0.5, 8.0),
}


@dataclass(frozen=True)
class Configuration:
    """Holds what all runs of a study share. Characters after the trained ones give the open-set images."""

    characters: int = 1600
    open_set_characters: int = 600
    fonts: int = 20
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=10))
    tuning_characters: int = 800
    tuning_recipe: Recipe = field(default_factory=lambda: Recipe(epochs=4))
    tuning_seed: int = 1000  # no run on test has it
    trials: dict[str, tuple[Setting, ...]] = field(default_factory=lambda: TRIALS)
    published: dict[str, Setting] = field(default_factory=lambda: PUBLISHED)
    evaluated_characters: int | None = None  # of validation and of test; None: all
    evaluated_fonts: int | None = None
    data_sha256: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain lists, dicts and numbers, as they come back from a file."""
        return _plain(asdict(self))


def full() -> Configuration:
    """Return the configuration behind docs/analysis.md."""
    return Configuration(data_sha256=_compact_sha256())


def quick() -> Configuration:
    """Return a toy configuration that takes the same path in seconds and learns nothing."""
    return Configuration(
        characters=12,
        open_set_characters=8,
        fonts=3,
        recipe=Recipe(epochs=2, batch=12),
        tuning_characters=8,
        tuning_recipe=Recipe(epochs=1, batch=12),
        trials={margin: trials[:1] + trials[-1:] for margin, trials in TRIALS.items()},
        evaluated_characters=16,
        evaluated_fonts=3,
        data_sha256=_compact_sha256(),
    )


@dataclass(frozen=True)
class Run:
    """Names one training: stage "tuning" (evaluated on validation), "final", "remedy", "followup" (test)."""

    stage: str
    condition: str
    margin: str
    mode: str
    m: float | None
    scale: float
    seed: int

    @property
    def head(self) -> Head:
        return self.margin, self.mode

    @property
    def name(self) -> str:
        """The run's unique name, with m and s in tuning only: elsewhere each run has one setting."""
        name = f"{self.stage}-{self.condition}-{head_name(self.head)}"
        if self.stage != TUNING:
            return f"{name}-seed{self.seed}"
        return f"{name}-s{self.scale:g}" if self.m is None else f"{name}-m{self.m:g}-s{self.scale:g}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def head_name(head: Head) -> str:
    """Return the head as command lines and results spell it, such as "expface-exact"."""
    return "-".join(head)


def head_named(name: str) -> Head:
    """Return the head with that `head_name`, or raise StudyError with the known ones."""
    known = {head_name(head): head for head in (*HEADS, *REMEDIES)}
    if name not in known:
        raise StudyError(f"heads: expected some of {', '.join(known)}, got {name}")
    return known[name]


Cell = tuple[str, str, Head]  # stage, condition, head: what several seeds are trained of
CELLS: tuple[Cell, ...] = (
    *((FINAL, condition, head) for condition in CONDITIONS for head in HEADS),
    *((REMEDY, "clean", head) for head in DRIFT_CONTROLS),
    *((REMEDY, REMEDY_CONDITION, head) for head in REMEDIES),
    *((FOLLOWUP, condition, head) for condition, head in FOLLOWUPS),
)


def cells(heads: Sequence[Head] | None = None, conditions: Sequence[str] | None = None) -> list[Cell]:
    """Return the study's cells, or those of the given heads and conditions; StudyError if none is left."""
    for condition in conditions or ():
        if condition not in CONDITIONS:
            raise StudyError(f"conditions: expected some of {', '.join(CONDITIONS)}, got {condition}")
    kept = [
        cell
        for cell in CELLS
        if (not conditions or cell[1] in conditions) and (not heads or cell[2] in heads)
    ]
    if not kept:
        raise StudyError("heads, conditions: no part of the study has both")
    return kept


def tunings(wanted: Sequence[Cell]) -> list[tuple[Head, str]]:
    """Return what the final cells need tuned: a head, and the condition that it is tuned under."""
    return list(
        dict.fromkeys(
            (head, CONDITIONS[condition].tuned_under) for stage, condition, head in wanted if stage == FINAL
        )
    )


def tuning_runs(configuration: Configuration, wanted: Sequence[Cell]) -> list[Run]:
    """Return the trials that the tunings of the final cells need."""
    return [
        Run(TUNING, condition, *head, m, scale, configuration.tuning_seed)
        for head, condition in tunings(wanted)
        for m, scale in configuration.trials[head[0]]
    ]


def test_runs(
    configuration: Configuration, wanted: Sequence[Cell], seeds: Sequence[int], tuned: Tuned
) -> list[Run]:
    """Return the runs of the cells, seed by seed, so that an interrupted study is complete for some seeds."""

    def settings(stage: str, condition: str, head: Head) -> Setting:
        if stage == REMEDY:
            return configuration.published[head[0]]
        if stage == FOLLOWUP:
            return FOLLOWUPS[condition, head]
        return tuned[head, CONDITIONS[condition].tuned_under]

    return [
        Run(stage, condition, *head, *settings(stage, condition, head), seed)
        for seed in seeds
        for stage, condition, head in wanted
    ]


Records = Mapping[Run, dict[str, Any]]


def trial_scores(records: Records, head: Head, condition: str) -> dict[Setting, float]:
    """Return the validation TAR of each trained trial of `head` under `condition`; 0 where it diverged."""
    found = {}
    for run, record in records.items():
        if run.stage == TUNING and run.head == head and run.condition == condition:
            found[run.m, run.scale] = record["result"]["tar"][TUNED_AT] if record["result"] else 0.0
    return found


def tune(configuration: Configuration, records: Records, wanted: Sequence[Cell]) -> Tuned:
    """Pick the best trial of each tuning, the first of equal ones; StudyError if one was not trained."""
    best = {}
    for head, condition in tunings(wanted):
        trials = configuration.trials[head[0]]
        scores = trial_scores(records, head, condition)
        missing = len(set(trials) - set(scores))
        if missing:
            raise StudyError(f"{head_name(head)}, {condition}: {missing} of its trials are not trained yet")
        best[head, condition] = max(trials, key=lambda trial: scores[trial])
    return best


def images(run: Run, configuration: Configuration) -> int:
    """Count the images that the run trains on over all epochs; the data has every character in every font."""
    if run.stage != TUNING:
        return _images(configuration.characters * configuration.fonts, configuration.recipe)
    return _images(configuration.tuning_characters * configuration.fonts, configuration.tuning_recipe)


def _images(rows: int, recipe: Recipe) -> int:
    return recipe.epochs * (rows // recipe.batch) * recipe.batch


def evaluated(glyphs: Glyphs, configuration: Configuration) -> Glyphs:
    """Return the glyphs with the part of validation and test that the configuration evaluates."""
    characters, fonts = configuration.evaluated_characters, configuration.evaluated_fonts
    return Glyphs(
        glyphs.train,
        glyphs.validation.subset(
            characters or len(glyphs.validation.characters), fonts or len(glyphs.validation.fonts)
        ),
        glyphs.test.subset(characters or len(glyphs.test.characters), fonts or len(glyphs.test.fonts)),
    )


def _compact_sha256() -> str:
    return checksum_file(COMPACT_FILE).read_text().split()[0]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
