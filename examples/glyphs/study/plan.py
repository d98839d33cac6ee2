"""What the study trains: conditions, heads, tries, seeds, schedules, and the names of its runs.

What is chosen for a study or a run is in `Configuration` and `Run`; both are written into every run's JSON.
What decides a result but is fixed in the code is not: `CONDITIONS` here, the mending schedules (heads.py),
the network (model.py), the distortions (augment.py), how training and judging go. Whoever changes that raises
`SCHEMA` (store.py), or a folder begun before it would go on and mix both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..dataset import COMPACT_FILE, Glyphs, checksum_file
from ..training import Recipe
from .heads import MARGINS, MODES, SLOPE_OF_COSINE

CHOICE, FINAL, MEND, MORE = "choice", "final", "mend", "more"


class StudyError(RuntimeError):
    """The study cannot go on as asked: another configuration, a missing run, a damaged file, bad options."""


@dataclass(frozen=True)
class Condition:
    """What is wrong with the training set: nothing, labels ("flipped") or images ("outsiders").

    Under `chosen_under` a head's m and s are chosen for it: one tunes a head on data like one's own.
    """

    title: str
    kind: str
    share: float
    chosen_under: str


CONDITIONS = {
    "clean": Condition("clean", "clean", 0.0, "clean"),
    "flip15": Condition("15% flipped", "flipped", 0.15, "flip30"),
    "flip30": Condition("30% flipped", "flipped", 0.30, "flip30"),
    "outsiders30": Condition("30% outsiders", "outsiders", 0.30, "flip30"),
}
Head = tuple[str, str]  # margin, mode
HEADS: tuple[Head, ...] = tuple(
    (margin, mode)
    for margin in MARGINS
    for mode in (("detached",) if margin in SLOPE_OF_COSINE else ("detached", "exact"))
)
SEEDS, QUICK_SEEDS = (0, 1, 2), (0, 1)

# m (None where a margin has none) and s: the same number for every head. With wrong labels low scales won in
# short probes, with clean ones middle ones; 32 lost either way.
Try = tuple[float | None, float]
SCALES = (8.0, 14.0, 24.0)
TRIES: dict[str, tuple[Try, ...]] = {
    "normface": tuple((None, scale) for scale in (6.0, 8.0, 11.0, 14.0, 19.0, 24.0)),
    "sphereface": tuple((m, scale) for m in (1.3, 1.5) for scale in SCALES),
    "cosface": tuple((m, scale) for m in (0.2, 0.35) for scale in SCALES),
    "arcface": tuple((m, scale) for m in (0.3, 0.5) for scale in SCALES),
    "expface": tuple((m, scale) for m in (0.7, 0.8) for scale in SCALES),
}
Chosen = Mapping[tuple[Head, str], Try]  # head, the condition under which it was chosen

# The mending series: not at the chosen m and s but where exact heads were seen to drift, at the published
# margins, the demo's scale and 30% of wrong labels; and, with nothing to mend, on clean ones.
PUBLISHED: dict[str, Try] = {"arcface": (0.5, 32.0), "expface": (0.7, 32.0)}
MENDED: tuple[Head, ...] = tuple((margin, mode) for margin in PUBLISHED for mode in MODES)
MENDED_CONDITION = "flip30"
UNMENDED: tuple[Head, ...] = tuple((margin, mode) for margin in PUBLISHED for mode in ("detached", "exact"))

# Added when the runs on test were known: heads to which the tries gave another scale than ExpFace's, at its
# scale and the better m there; and exact ArcFace at the m that has about the slope of ExpFace(0.7).
FURTHER: dict[tuple[str, Head], Try] = {
    ("clean", ("normface", "detached")): (None, 14.0),
    ("clean", ("cosface", "detached")): (0.2, 14.0),
    ("clean", ("arcface", "exact")): (0.5, 14.0),
    **{(c, ("sphereface", "exact")): (1.5, 8.0) for c in ("flip15", "flip30", "outsiders30")},
    ("flip30", ("arcface", "exact")): (0.5, 8.0),
}


@dataclass(frozen=True)
class Configuration:
    """What all runs of one study have in common. The characters after the trained ones are the outsiders."""

    characters: int = 1600
    outsiders: int = 600
    fonts: int = 20
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=10))
    choice_characters: int = 800
    choice_recipe: Recipe = field(default_factory=lambda: Recipe(epochs=4))
    choice_seed: int = 1000  # no final run has it
    tries: dict[str, tuple[Try, ...]] = field(default_factory=lambda: TRIES)
    published: dict[str, Try] = field(default_factory=lambda: PUBLISHED)
    evaluated_characters: int | None = None  # of validation and of test; None: all
    evaluated_fonts: int | None = None
    data_sha256: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as they come back from a file."""
        return _plain(asdict(self))


def full() -> Configuration:
    """The study behind docs/analysis.md."""
    return Configuration(data_sha256=_compact_sha256())


def quick() -> Configuration:
    """The same path in seconds: nothing is learnt."""
    return Configuration(
        characters=12,
        outsiders=8,
        fonts=3,
        recipe=Recipe(epochs=2, batch=12),
        choice_characters=8,
        choice_recipe=Recipe(epochs=1, batch=12),
        tries={margin: tries[:1] + tries[-1:] for margin, tries in TRIES.items()},
        evaluated_characters=16,
        evaluated_fonts=3,
        data_sha256=_compact_sha256(),
    )


@dataclass(frozen=True)
class Run:
    """One training: stage "choice" (judged on validation), "final", "mend" or "more" (judged on test)."""

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
        """Of its file; with m and s in a choice only: elsewhere none may exist twice with different ones."""
        name = f"{self.stage}-{self.condition}-{head_name(self.head)}"
        if self.stage != CHOICE:
            return f"{name}-seed{self.seed}"
        return f"{name}-s{self.scale:g}" if self.m is None else f"{name}-m{self.m:g}-s{self.scale:g}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def head_name(head: Head) -> str:
    """ "expface-exact", as command lines and files have it."""
    return "-".join(head)


def head_named(name: str) -> Head:
    """The head of `head_name`. Raises StudyError with those there are."""
    known = {head_name(head): head for head in (*HEADS, *MENDED)}
    if name not in known:
        raise StudyError(f"heads: expected some of {', '.join(known)}, got {name}")
    return known[name]


Cell = tuple[str, str, Head]  # stage, condition, head: what several seeds are trained of
CELLS: tuple[Cell, ...] = (
    *((FINAL, condition, head) for condition in CONDITIONS for head in HEADS),
    *((MEND, "clean", head) for head in UNMENDED),
    *((MEND, MENDED_CONDITION, head) for head in MENDED),
    *((MORE, condition, head) for condition, head in FURTHER),
)


def cells(heads: Sequence[Head] | None = None, conditions: Sequence[str] | None = None) -> list[Cell]:
    """The study's cells, or those of the named heads and conditions. StudyError if none is left."""
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


def choices(wanted: Sequence[Cell]) -> list[tuple[Head, str]]:
    """The choices that the final cells need: head, and the condition that it is chosen under."""
    return list(
        dict.fromkeys(
            (head, CONDITIONS[condition].chosen_under) for stage, condition, head in wanted if stage == FINAL
        )
    )


def choice_runs(configuration: Configuration, wanted: Sequence[Cell]) -> list[Run]:
    """The tries behind the choices of the final cells."""
    return [
        Run(CHOICE, condition, *head, m, scale, configuration.choice_seed)
        for head, condition in choices(wanted)
        for m, scale in configuration.tries[head[0]]
    ]


def judged_runs(
    configuration: Configuration, wanted: Sequence[Cell], seeds: Sequence[int], chosen: Chosen
) -> list[Run]:
    """The runs of the cells, seed by seed, so that a study that was stopped is complete for some seeds."""

    def settings(stage: str, condition: str, head: Head) -> Try:
        if stage == MEND:
            return configuration.published[head[0]]
        if stage == MORE:
            return FURTHER[condition, head]
        return chosen[head, CONDITIONS[condition].chosen_under]

    return [
        Run(stage, condition, *head, *settings(stage, condition, head), seed)
        for seed in seeds
        for stage, condition, head in wanted
    ]


def images(run: Run, configuration: Configuration) -> int:
    """How many images the run trains on, over all epochs; the set has every character in every font."""
    if run.stage != CHOICE:
        return _images(configuration.characters * configuration.fonts, configuration.recipe)
    return _images(configuration.choice_characters * configuration.fonts, configuration.choice_recipe)


def _images(rows: int, recipe: Recipe) -> int:
    return recipe.epochs * (rows // recipe.batch) * recipe.batch


def evaluated(glyphs: Glyphs, configuration: Configuration) -> Glyphs:
    """The validation and test sets that the configuration looks at."""
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
