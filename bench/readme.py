"""README's tables and measured numbers, from the files in bench/results.

A block of README stands between `<!-- bench: NAME -->` and `<!-- /bench -->`, on lines of its own or within
one. `rendered` writes every block anew; a block whose file is not there yet is empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import model, peers
from bench.cases import LARGEST_WITH_LOGITS
from bench.compare import load
from bench.markdown import (
    NOTHING,
    bytes_of,
    link,
    machine_of,
    markdown_table,
    megabytes_of,
    paragraph,
    seconds_of,
    shape_of,
    typed,
)
from bench.peers import BASELINE, SAMPLED_BASELINE, baseline
from bench.peers.base import NO_MARGIN
from bench.result import Memory, Result
from bench.slopes import FLAT_PEER, Slopes, rounded, slopes
from bench.sweep_result import Point, Sweep

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
MAIN, SHARED = "cpu-b256-c100k-d512.json", "cpu-b256-c100k-d512-one-core-shared.json"
KEPT = "cpu-b256-c100k-d512-memory-kept.json"
SWEEP, MODEL, DEMO, GPU = "cpu-sweep.json", "model-h100.json", "demo.json", "gpu-*.json"
SAMPLED = "partial-fc.json"
PLOTS = "cpu-sweep"
"""The folder of the sweep's pictures."""
_BLOCK = re.compile(
    r"(?P<start><!-- bench: (?P<name>[\w-]+) -->)(?P<text>.*?)(?P<end><!-- /bench -->)", re.DOTALL
)
MADE_BY = {
    f"python -m bench sweep --json bench/results/{SWEEP} --plots bench/results/{PLOTS}": "make bench-sweep"
}
"""Commands that have a target in the Makefile, which writes the files that README shows."""
WITHIN_A_LINE = ("model",)
"""Blocks of an item of a list."""
OURS = {"ours": "**this package**", "ours@0": "this package, `workspace_bytes=0`"}


def rendered(text: str, results: Path = RESULTS) -> str:
    """The text with all its blocks as the files have them; ValueError for a block or file that is none."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"README: expected blocks of {list(BLOCKS)}, got {name!r}")
        content = BLOCKS[name](results)
        if name not in WITHIN_A_LINE:
            content = f"\n{content}\n" if content else "\n"
        return f"{match['start']}{content}{match['end']}"

    return _BLOCK.sub(block, text)


def outside(text: str) -> str:
    """The text without its blocks."""
    return _BLOCK.sub("", text)


def _file(results: Path, name: str) -> Path | None:
    path = results / name
    return path if path.is_file() else None


def _single(results: Path, name: str) -> Result | None:
    path = _file(results, name)
    if path is None:
        return None
    found = load(path)
    if not isinstance(found, Result):
        raise ValueError(f"{path}: expected a single case, got a sweep")
    return found


def _sweep(path: Path) -> Sweep:
    found = load(path)
    if not isinstance(found, Sweep):
        raise ValueError(f"{path}: expected a sweep, got a single case")
    return found


def times_ours(result: Result) -> dict[str, float]:
    """How many times as fast ours is as each peer, by medians of the quietest run.

    Of a peer that samples the classes: ours that samples them too.
    """
    if (best := result.best_run) is None:
        return {}
    seconds = {peer: result.seconds(peer, best).median for peer in result.runs[best]}
    ours = {peer: "ours" if baseline(peer) == BASELINE else "ours_sampled" for peer in seconds}
    return {
        peer: value / seconds[ours[peer]] for peer, value in seconds.items() if not peer.startswith("ours")
    }


def speed(results: Path) -> str:
    """The headline case: seconds, ratios of every run, memory."""
    result = _single(results, MAIN)
    if result is None or result.best_run is None:
        return ""
    best, case = result.best_run, result.case
    memory = {entry.peer: entry for entry in result.memory if entry.case == case}
    untimed = [peer for peer in memory if peer not in result.runs[best] and memory[peer].extra_bytes]
    names = [*result.runs[best], *untimed]
    # Where both are there, the label of the timed size: a gate's chunk may be smaller.
    labels = {gate.peer: gate.label for gate in result.gates}
    labels |= {peer: entry.label for peer, entry in memory.items() if peer in labels}
    rows = []
    for peer in names:
        timed = peer in result.runs[best]
        ratios = [result.ratio(peer, run) for run in range(len(result.runs))] if timed else []
        rows.append(
            [
                OURS.get(peer, labels[peer]) + (f" ({case.target_gradient})" if peer in OURS else ""),
                seconds_of(result.seconds(peer, best).median) if timed else "not timed",
                ", ".join(NOTHING if r is None else f"{r:.2f}" for r in ratios) or NOTHING,
                _held(memory.get(peer), bytes_of),
            ]
        )
    runs = ", ".join(str(run + 1) for run in range(len(result.runs)))
    table = markdown_table(
        ["head", f"seconds, run {best + 1}", f"times eager, runs {runs}", "extra memory"], rows
    )
    prose = paragraph(
        f"`{typed(result.command)}`: forward and both gradients, {shape_of(case)}, {case.dtype}, "
        f"{case.margin}, {case.target_gradient} gradient; {machine_of(result.machine)}. "
        f"Heads take turns within a process; medians of {result.rounds} rounds, in the quietest of "
        f"{len(result.runs)} runs. Every head's loss and gradients are held against float64 before it is "
        f"timed. All numbers: {link(MAIN)}."
    )
    note = (
        f"\n\nHeads that sample the classes are compared with `{SAMPLED_BASELINE}`, which does the same work."
        if SAMPLED_BASELINE in names
        else ""
    )
    return f"{prose}\n\n{table}{note}"


def kept(results: Path) -> str:
    """The peers where malloc keeps what they free: how much of ours' lead is left, and all seconds."""
    result = _single(results, KEPT)
    if result is None or (best := result.best_run) is None:
        return ""
    times = times_ours(result)
    labels = {gate.peer: OURS.get(gate.peer, gate.label) for gate in result.gates}
    parts = []
    for peer in result.runs[best]:
        ratio = f" ({times[peer]:.2f} times ours)" if peer in times else ""
        parts.append(f"{labels[peer]} {result.seconds(peer, best).median:.2g} s{ratio}")
    return paragraph(
        "Much of the peers' time goes into pages that malloc gives back after a step and asks for anew in "
        f"the next. Told to keep them (`{typed(result.command)}`, {link(KEPT)}), this package is "
        f"{_lead_left(times, labels, _single(results, MAIN))}; all of them: {'; '.join(parts)}."
    )


def _nearest(times: dict[str, float]) -> list[str]:
    """The peers over all classes that come nearest to ours: with a margin, and without."""
    found: dict[bool, str] = {}
    for peer in sorted(times, key=times.__getitem__):
        if baseline(peer) == BASELINE:
            found.setdefault(peers.get(peer).margins == NO_MARGIN, peer)
    return [found[without] for without in sorted(found)]


def _lead_left(times: dict[str, float], labels: dict[str, str], plain: Result | None) -> str:
    """How many times as fast ours is as the nearest peers where malloc keeps memory, and where not."""
    before = {} if plain is None else times_ours(plain)
    nearest = _nearest(times)
    less = all(times[peer] < before.get(peer, 0.0) for peer in nearest)
    return ("only " if less else "") + " and ".join(
        f"{times[peer]:.2f} times as fast as {labels[peer]}"
        + (f" (with malloc as it is: {before[peer]:.2f})" if peer in before else "")
        for peer in nearest
    )


def shared(results: Path) -> str:
    """The same while another process keeps a core busy."""
    result = _single(results, SHARED)
    if result is None:
        return ""
    runs = range(len(result.runs))
    parts = []
    for peer in result.runs[0]:
        if baseline(peer) == BASELINE and peer != BASELINE:
            found = [result.ratio(peer, run) for run in runs]
            label = next(gate.label for gate in result.gates if gate.peer == peer)
            numbers = " and ".join(NOTHING if ratio is None else f"{ratio:.2f}" for ratio in found)
            parts.append(f"{OURS.get(peer, label)} {numbers}")
    return paragraph(
        f"While another process spins on one of the cores (`{typed(result.command)}`, "
        f"{link(SHARED)}), times the speed of the eager head: {'; '.join(parts)}."
    )


def memory(results: Path) -> str:
    """Peak extra memory against classes, at the shape of the single run's sweep."""
    result = _single(results, MAIN)
    if result is None:
        return ""
    entries = [entry for entry in result.memory if entry.case != result.case]
    if not entries:
        return ""
    cases = list(dict.fromkeys(entry.case for entry in entries))
    found = {(entry.peer, entry.case): entry for entry in entries}
    rows = []
    for peer in dict.fromkeys(entry.peer for entry in entries if entry.extra_bytes is not None):
        label = OURS.get(peer, next(entry.label for entry in entries if entry.peer == peer))
        rows.append([label, *(_held(found.get((peer, case))) for case in cases)])
    first = cases[0]
    prose = paragraph(
        f"`{typed(result.command)}` measures memory too, each number in a process of its own: peak "
        f"extra memory of a step beside inputs and the two gradients, B = {first.rows:,}, "
        f"D = {first.features:,}, in MB ({link(MAIN)}); heads that hold as much as all logits are measured "
        f"to C = {LARGEST_WITH_LOGITS:,} only:"
    )
    return f"{prose}\n\n" + markdown_table(["head", *(f"C = {case.classes:,}" for case in cases)], rows)


def _held(entry: Memory | None, number: Callable[[float], str] = megabytes_of) -> str:
    """The number; where there is none what it needs, if that was the reason."""
    if entry is not None and entry.extra_bytes is not None:
        return number(entry.extra_bytes)
    needs = re.match(r"needs about (\S+ [kMG]B)", (entry and entry.why_not) or "")
    return "not measured" if needs is None else f"needs {needs[1]}"


def sweep(results: Path) -> str:
    """The two plots against classes, and both slopes."""
    path = _file(results, SWEEP)
    if path is None:
        return ""
    found = _sweep(path)
    axis = next(axis for axis in found.axes if axis.varies == "classes")
    pictures = "\n".join(
        f"![{text}](bench/results/{PLOTS}/classes-{name}.png)"
        for name, text in (("seconds", "seconds against classes"), ("memory", "extra memory against classes"))
    )
    slope = slopes(found, axis, FLAT_PEER, backward=True)
    prose = paragraph(
        f"`{MADE_BY.get(found.command) or typed(found.command)}` "
        f"({found.took_seconds / 60:.0f} minutes, {link(SWEEP)}); "
        f"{machine_of(found.machine)}:"
    )
    return f"{prose}\n\n{pictures}\n\n{_growth(slope)}".rstrip()


def _growth(slope: Slopes | None) -> str:
    if slope is None or slope.memory_exponent is None or slope.bytes_a_class is None:
        return ""
    return paragraph(
        f"From C = {slope.first:,} to {slope.last:,} with `workspace_bytes=0`, the time of a step grows as "
        f"C^{slope.seconds_exponent:.2f} and its extra memory as C^{rounded(slope.memory_exponent, 2)}, by "
        f"{rounded(slope.bytes_a_class, 1)} bytes a class."
    )


def gpu(results: Path) -> str:
    """A table of seconds for each card."""
    parts = []
    for path in sorted(results.glob(GPU)):
        found = _sweep(path)
        shapes = list(
            dict.fromkeys((p.case.dtype, p.case.rows, p.case.classes, p.case.features) for p in found.points)
        )
        at = {(p.peer, p.case.dtype, p.case.rows, p.case.classes, p.case.features): p for p in found.points}
        labels = {point.peer: point.label for point in found.points if point.median is not None}
        rows = [
            [OURS.get(peer, label), *(_cell(found, at.get((peer, *shape))) for shape in shapes)]
            for peer, label in labels.items()
        ]
        columns = ["head", *(f"{dtype}, B = {b:,}, C = {c:,}" for dtype, b, c, _ in shapes)]
        prose = paragraph(
            f"On one {found.machine['gpu']['card']} (`{typed(found.command)}`, {link(path.name)}), "
            f"D = {shapes[0][3]:,}, bfloat16 autocast, ms of a step (times as fast as the eager "
            "head), by the dtype of embeddings and centres:"
        )
        parts.append(f"{prose}\n\n{markdown_table(columns, rows)}")
    return "\n\n".join(parts)


def _cell(found: Sweep, point: Point | None) -> str:
    if point is None or point.median is None:
        needs = None if point is None else point.needs_bytes
        return NOTHING if needs is None else f"needs {needs / 1e9:.3g} GB"
    ratio = found.ratio(point)
    return f"{1e3 * point.median:.3g}" + ("" if ratio is None else f" ({ratio:.2f})")


def counted(results: Path) -> str:
    """What a step would cost on a GPU, by the model."""
    path = _file(results, MODEL)
    if path is None:
        return ""
    data = json.loads(path.read_text())
    if (data.get("kind"), data.get("schema")) != (model.KIND, model.SCHEMA):
        raise ValueError(f"{path}: expected a model of schema {model.SCHEMA}")
    ours, eager = data["ours"], data["eager"]
    dtype = data["case"]["dtype"]
    return paragraph(
        f"`{typed(data['command'])}` counts what a step would cost: a roofline of "
        f"{ours['milliseconds']:.1f} ms and {bytes_of(ours['extra_bytes'])} beside the weight gradient, "
        f"where an eager {dtype} head has {eager['milliseconds']:.0f} ms and "
        f"{bytes_of(eager['extra_bytes'])}.",
        indent="  ",
    )


def sampled(results: Path) -> str:
    """What a sample of the classes costs beside all of them."""
    path = _file(results, SAMPLED)
    if path is None:
        return ""
    data = json.loads(path.read_text())
    sizes = data["sizes"]
    held = " and ".join(
        f"{bytes_of(value)} at C = {int(classes):,}" for classes, value in data["draw_bytes"].items()
    )
    return paragraph(
        f"`python -m bench.partial_fc` ({link(SAMPLED)}): drawing {sizes['draw_rate']:.0%} of "
        f"{sizes['draw_classes']:,} classes takes {data['draw']['ratio']:.3f} of the time of `torch.rand(C)` "
        f"and `topk`, and {held}; a step at `sample_rate={sizes['step_rate']:g}` with `sparse_grad` takes "
        f"{data['step']['ratio']:.2f} of one over all classes at B = {sizes['rows']}, "
        f"C = {sizes['step_classes']:,}, D = {sizes['features']}, and {data['step with SGD']['ratio']:.2f} "
        f"with the optimizer's."
    )


def demo(results: Path) -> str:
    """What the example's full run reached."""
    path = _file(results, DEMO)
    if path is None:
        return ""
    data = json.loads(path.read_text())
    reached = data["losses"]["expface"]
    return paragraph(
        f"`make demo` on {data['cores']} cores of an {data['cpu']}: {data['characters']:,} kanji, "
        f"{data['fonts']} fonts, "
        f"{data['epochs']} epochs in {reached['seconds']:.0f} s; on {data['test_characters']} other kanji in "
        f"{data['test_fonts']} other fonts TAR@FAR 1e-3 is {reached['tar']['0.001']:.3f} and rank-1 "
        f"{reached['rank1']:.3f} (seed {data['seed']}). The whole demo took {data['seconds'] / 60:.1f} "
        f"minutes ({link(DEMO)})."
    )


BLOCKS: dict[str, Callable[[Path], str]] = {
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
