"""Writes the tables of README and docs/benchmarks.md from the files in bench/results.

A block of a document stands between `<!-- bench: NAME -->` and `<!-- /bench -->`, on lines of its own or
within one. `rendered` writes every block anew; a block whose file is not there yet is empty.
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import partial_fc, peers
from bench.cases import Case
from bench.peers import BASELINE, baseline, is_ours
from bench.records import BYTES, ROOFLINE, Measurement, Run, load
from bench.report import NOTHING, bytes_of, growth, growth_cells, megabytes_of, missing, ratios_of, seconds_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
RESULTS = ROOT / "bench" / "results"
MAIN, SHARED = "cpu-b256-c100k-d512.jsonl", "cpu-b256-c100k-d512-one-core-shared.jsonl"
KEPT, SAMPLED = "cpu-b256-c100k-d512-memory-kept.jsonl", "partial-fc.jsonl"
SWEEP, MODEL, DEMO, GPU = "cpu-sweep.jsonl", "model-h100.jsonl", "demo.json", "gpu-*.jsonl"
PLOTS = "cpu-sweep"
"""The folder of the sweep's pictures."""
WIDTH = 112
HEADLINE = (
    "ours", "eager", "compiled", "pml_arcface", "torch_linear_compiled", "ours_sampled", "partial_fc",
)  # fmt: skip
"""The peers of README's table."""
GROWING = ("ours", "ours@0", "eager", "compiled_dynamic", "pml_arcface", "torch_linear_dynamic")
OURS = {"ours": "**this package**", "ours@0": "this package, `workspace_bytes=0`"}
WITHIN_A_LINE = ("model",)
"""Blocks within a sentence or an item of a list."""
_BLOCK = re.compile(
    r"(?P<start><!-- bench: (?P<name>[\w-]+) -->)(?P<text>.*?)(?P<end><!-- /bench -->)", re.DOTALL
)


def rendered(documents: Iterable[Path] = DOCUMENTS, results: Path = RESULTS) -> dict[Path, str]:
    """Return each document's text with all its blocks as the files have them.

    ValueError for a block or a file that is none.
    """
    return {path: render(path.read_text(), path.name, results) for path in documents}


def render(text: str, document: str, results: Path = RESULTS) -> str:
    """Return the text of one document with its blocks written anew."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"{document}: expected blocks of {list(BLOCKS)}, got {name!r}")
        content = BLOCKS[name](results)
        if document != DOCUMENTS[0].name:
            content = content.replace("](bench/", "](../bench/")
        if name not in WITHIN_A_LINE:
            content = f"\n{content}\n" if content else "\n"
        return f"{match['start']}{content}{match['end']}"

    return _BLOCK.sub(block, text)


def outside(text: str) -> str:
    """Return the text without its blocks."""
    return _BLOCK.sub("", text)


@functools.cache
def _loaded(path: Path) -> Run:
    return load(path)


def block_of(name: str) -> Callable[[Callable[[Run], str]], Callable[[Path], str]]:
    """Make a block of a function of one file's run; empty where the file is not there."""

    def wrap(function: Callable[[Run], str]) -> Callable[[Path], str]:
        def written(results: Path) -> str:
            path = results / name
            return function(_loaded(path)) if path.is_file() else ""

        return written

    return wrap


def main_case(run: Run) -> Case:
    """Return the first shape that was timed."""
    return run.cases()[0]


def times_ours(run: Run) -> dict[str, float]:
    """Say how many times as fast ours is as each peer, by medians of the least disturbed run.

    Of a peer that samples the classes: ours that samples them, too.
    """
    rows = {peer: m.value for peer, m in run.at(main_case(run)).items() if m.value is not None}
    ours = {peer: rows.get("ours" if baseline(peer) == BASELINE else "ours_sampled") for peer in rows}
    return {peer: value / own for peer, value in rows.items() if (own := ours[peer]) and not is_ours(peer)}


@block_of(MAIN)
def headline(run: Run) -> str:
    """Write README's table: seconds, times as fast, memory of few heads."""
    return _speed_table(run, HEADLINE)


@block_of(MAIN)
def speed(run: Run) -> str:
    """Write the headline case of every peer, and where it comes from."""
    case, rounds = main_case(run), max(len(m.values) for m in run.at(main_case(run)).values())
    prose = (
        f"{_source(run, MAIN)}: forward and both gradients, B = {case.rows:,}, C = {case.classes:,}, "
        f"D = {case.features:,}, {case.dtype}, {case.margin}, {case.target_gradient} gradient; medians of "
        f"{rounds} rounds, in the least disturbed of {len(run.runs(case))} runs."
    )
    names = [name for name, m in (run.at(case) | run.at(case, BYTES)).items() if m.values]
    names += [name for name, m in run.at(case, BYTES).items() if m.values and name not in names]
    return f"{_paragraph(prose)}\n\n{_speed_table(run, names)}"


def _speed_table(run: Run, names: Sequence[str]) -> str:
    case, runs = main_case(run), run.runs(main_case(run))
    timed, held, rows = run.at(case), run.at(case, BYTES), []
    for name in names:
        found = timed.get(name)
        seconds = None if found is None else found.value
        memory = held[name].value if name in held else None
        ratios = [] if seconds is None else [run.ratio(case, name, i) for i in runs]
        rows.append(
            [
                _label(found or held[name]),
                "not timed" if seconds is None else seconds_of(seconds),
                ratios_of(ratios),
                NOTHING if memory is None else bytes_of(memory),
            ]
        )
    columns = ["head", "seconds", f"times eager, runs {', '.join(map(str, runs))}", "extra memory"]
    return markdown_table(columns, rows)


def kept(results: Path) -> str:
    """Write the seconds of each peer where malloc keeps what they free, beside those where it does not."""
    if not (results / KEPT).is_file() or not (results / MAIN).is_file():
        return ""
    plain, run = _loaded(results / MAIN), _loaded(results / KEPT)
    rows = []
    for name, found in run.at(main_case(run)).items():
        cells = []
        for each in (plain, run):
            row, times = each.at(main_case(each)).get(name), times_ours(each).get(name)
            cells += [
                NOTHING if row is None or row.value is None else seconds_of(row.value),
                NOTHING if times is None else f"{times:.2f}",
            ]
        rows.append([_label(found), *cells])
    columns = ["head", "seconds", "times ours", "seconds, memory kept", "times ours, memory kept"]
    return f"{_paragraph(_source(run, KEPT) + ':')}\n\n{markdown_table(columns, rows)}"


@block_of(SHARED)
def shared(run: Run) -> str:
    """Write the ratios while another process keeps a core busy."""
    case = main_case(run)
    rows = [
        [_label(found), ratios_of([run.ratio(case, name, i) for i in run.runs(case)])]
        for name, found in run.at(case).items()
        if found.values and name != BASELINE
    ]
    columns = ["head", f"times eager, runs {', '.join(map(str, run.runs(case)))}"]
    return f"{_paragraph(_source(run, SHARED) + ':')}\n\n{markdown_table(columns, rows)}"


@block_of(MAIN)
def memory(run: Run) -> str:
    """Write peak extra memory against classes, at the shapes that were not timed."""
    cases = [case for case in run.cases(BYTES) if case.shape != main_case(run).shape]
    if not cases:
        return ""
    labels = {m.peer: m for case in reversed(cases) for m in run.at(case, BYTES).values()}
    names = [name for name in run.at(cases[0], BYTES) if run.at(cases[0], BYTES)[name].values]
    rows = [[_label(labels[n]), *(_held(run.at(case, BYTES).get(n)) for case in cases)] for n in names]
    first = cases[0]
    prose = (
        f"{_source(run, MAIN)}: MB beside inputs and gradients at B = {first.rows:,}, D = {first.features:,}."
    )
    table = markdown_table(["head", *(f"C = {case.classes:,}" for case in cases)], rows)
    return f"{_paragraph(prose)}\n\n{table}"


def _held(found: Measurement | None) -> str:
    if found is not None and found.value is not None:
        return megabytes_of(found.value)
    said = missing(found)
    return said if said.startswith("needs") else "not measured"


@block_of(SWEEP)
def sweep(run: Run) -> str:
    """Write how seconds and memory grow with the classes."""
    case = main_case(run)
    case = max((c for c in run.cases() if c.backward), key=lambda c: len(run.line(c, "ours")), default=case)
    rows = []
    for name in GROWING:
        if (fit := growth(run, case, name)) is not None:
            rows.append([_label(run.at(case)[name]), f"{fit.first:,} to {fit.last:,}", *growth_cells(fit)])
    columns = ["head", "classes", "seconds ~ C^", "extra memory ~ C^", "bytes per class"]
    took = "" if run.took_seconds is None else f", {run.took_seconds / 60:.0f} minutes"
    prose = f"{_source(run, SWEEP)}{took}: B = {case.rows:,}, D = {case.features:,}."
    return f"{_paragraph(prose)}\n\n{markdown_table(columns, rows)}"


@block_of(SAMPLED)
def sampled(run: Run) -> str:
    """Write what a sample of the classes costs beside all of them."""
    shares, rows = partial_fc.ratios(run), []
    for m in run.measurements:
        if m.peer in partial_fc.COMPARED and m.what != BYTES:
            against, _ = partial_fc.COMPARED[m.peer]
            of = f"{m.peer}, {m.case.sample_rate:.0%} of C = {m.case.classes:,}"
            digits = 3 if m.peer == partial_fc.DRAW else 2
            rows.append([of, f"`{against}`" if "(" in against else against, f"{shares[m.peer]:.{digits}f}"])
    held = " and ".join(
        f"{bytes_of(m.values[0])} at C = {m.case.classes:,}" for m in run.measurements if m.what == BYTES
    )
    step = next(m.case for m in run.measurements if m.peer == partial_fc.STEP)
    prose = (
        f"{_source(run, SAMPLED)}: steps at B = {step.rows:,}, D = {step.features:,}, with `sparse_grad`; "
        f"drawing a sample takes {held}."
    )
    table = markdown_table(["", "against", "share of its seconds"], rows)
    return f"{_paragraph(prose)}\n\n{table}"


def gpu(results: Path) -> str:
    """Write a table of milliseconds for each card."""
    parts = []
    for path in sorted(results.glob(GPU)):
        run = _loaded(path)
        cases = run.cases()
        labels = {m.peer: _label(m) for m in run.measurements if m.values and m.what != BYTES}
        rows = [
            [label, *(_milliseconds(run, case, name) for case in cases)] for name, label in labels.items()
        ]
        columns = ["head", *(f"{c.dtype}, B = {c.rows:,}, C = {c.classes:,}" for c in cases)]
        prose = (
            f"{_source(run, path.name)}: ms of a step (times as fast as the eager head), D = "
            f"{cases[0].features:,}, {cases[0].autocast} autocast, by the dtype of embeddings and centers."
        )
        parts.append(f"{_paragraph(prose)}\n\n{markdown_table(columns, rows)}")
    return "\n\n".join(parts)


def _milliseconds(run: Run, case: Case, name: str) -> str:
    found = run.at(case).get(name)
    if found is None or found.value is None:
        return missing(found)
    ratio = run.ratio(case, name)
    return f"{1e3 * found.value:.3g}" + ("" if ratio is None else f" ({ratio:.2f})")


@block_of(MODEL)
def counted(run: Run) -> str:
    """Write what a step would cost on a GPU, by the model: a sentence."""
    case = run.cases(ROOFLINE)[0]
    times, held = run.at(case, ROOFLINE), run.at(case, BYTES)
    ours = next(name for name in times if is_ours(name))
    found = {n: (1e3 * (times[n].value or 0), bytes_of(held[n].value or 0)) for n in (ours, BASELINE)}
    return _paragraph(
        f"`{typed(run.header.command)}` counts what a step would cost: a roofline of "
        f"{found[ours][0]:.1f} ms and {found[ours][1]} beside the weight gradient, "
        f"where an eager {case.dtype} head has {found[BASELINE][0]:.0f} ms and {found[BASELINE][1]}.",
        indent="  ",
    )


def demo(results: Path) -> str:
    """Write what the example's full run reached."""
    path = results / DEMO
    if not path.is_file():
        return ""
    data: dict[str, Any] = json.loads(path.read_text())
    reached = data["losses"]["expface"]
    return _paragraph(
        f"`make demo` on {data['cores']} cores of an {data['cpu']}: {data['characters']:,} kanji, "
        f"{data['fonts']} fonts, {data['epochs']} epochs in {reached['seconds']:.0f} s; on "
        f"{data['test_characters']} other kanji in {data['test_fonts']} other fonts TAR@FAR 1e-3 is "
        f"{reached['tar']['0.001']:.3f} and rank-1 {reached['rank1']:.3f} (seed {data['seed']}). The whole "
        f"demo took {data['seconds'] / 60:.1f} minutes ([{DEMO}](bench/results/{DEMO}))."
    )


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "speed": speed,
    "kept": kept,
    "shared": shared,
    "memory": memory,
    "sweep": sweep,
    "sampled": sampled,
    "gpu": gpu,
    "model": counted,
    "demo": demo,
}


def typed(command: str) -> str:
    """Return the command as a user types it, whose files go to `out/` and not over ours."""
    return re.sub(r" --(json|plots) \S+", "", command)


def _source(run: Run, name: str) -> str:
    """Say which command made the file, and on what."""
    machine = run.header.machine
    where = (
        machine["gpu"]["card"]
        if machine.get("gpu")
        else f"{machine['cores']} cores of an {machine['cpu']} ({machine['instruction_set']} kernels)"
    )
    load_ = machine["load_average"]
    busy = "" if load_ is None else f", load {load_:g} before the run"
    return (
        f"[`{typed(run.header.command)}`](bench/results/{name}) on {where}, "
        f"torch {machine['torch'].partition('+')[0]}{busy}"
    )


def _label(found: Measurement) -> str:
    peer, mode = peers.get(found.peer), f" ({found.case.target_gradient})"
    return OURS[found.peer] + mode if peer.name in OURS else found.label


def _paragraph(text: str, indent: str = "") -> str:
    """Break into lines; a link or a command's options stay whole."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write Markdown, the first column to the left."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
