"""The command line: options reach the records, bad input is one line, what fails has its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import machine, measure, memory, peers, plans, plots
from bench.__main__ import OUT, TOY_NOTE
from bench.gate import GATE_CLASSES
from bench.plans import TOY
from bench.records import BYTES, FAILED, SECONDS, SKIPPED, UNAVAILABLE, Run, load
from bench.runner import Plan
from tests.test_bench import strange_peers

STRANGE = strange_peers.__name__
STRANGE_IMPORT = "tests.test_bench.strange_import"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written without a path stays out of the repository."""
    monkeypatch.chdir(tmp_path)


def _main(*argv: str) -> int:
    """The exit code, whether it is returned or argparse's."""
    try:
        return command.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def _timed(run: Run) -> dict[str, list[int]]:
    """The rounds of each run of each peer."""
    found: dict[str, list[int]] = {}
    for m in run.measurements:
        if m.what == SECONDS and m.values:
            found.setdefault(m.peer, []).append(len(m.values))
    return found


BOTH = [
    (["--peers", "nobody"], "nobody"),
    (["--peers", f"{STRANGE}:NOTHING"], "NOTHING"),
    (["--peers", f"{STRANGE}:UNABLE"], "it is Sunday"),
    (["--peers", "no.such.module:PEER"], "no.such.module"),
    (["--peers", ".x:y"], "'.x:y' cannot be imported"),
    (["--peers", f"{STRANGE_IMPORT}:PEER"], "cannot be imported: not today"),
    (["--peers", "os:getcwd"], "expected 'os:getcwd' to be a bench.peers.base.Peer"),
    (["--peers", f"ours@{2**63}"], "workspace-bytes: expected at most 2**63 - 1"),
    (["--rows", "0"], "rows"),
    (["--rows", "many"], "rows"),
    (["--classes", "-3"], "classes"),
    (["--classes", "1"], "classes: expected at least 2, got 1"),
    (["--classes", str(10**13)], "does not fit"),
    (["--features", "0"], "features"),
    (["--margin", "none"], "margin"),
    (["--target-gradient", "both"], "target-gradient"),
    (["--rounds", "0"], "rounds"),
    (["--json", "no/such/directory/x.jsonl"], "json: no/such/directory/x.jsonl cannot be written"),
    (["--json", "."], "json: . cannot be written (Is a directory)"),
    (["--unknown"], "unknown"),
]
SINGLE = [
    (["--scale", "0"], "scale"),
    (["--scale", "nan"], "scale"),
    (["--runs", "0"], "runs"),
    (["--workspace-bytes", "-1"], "workspace-bytes"),
    (["--workspace-bytes", str(2**64)], "workspace-bytes: expected at most 2**63 - 1"),
    (["--memory-classes", str(10**13)], "does not fit"),
    (["--device", "tpu"], "device"),
    (["--dtype", "int8"], "dtype"),
    (["--autocast", "float32"], "autocast"),
]
SWEEP = [
    (["--seconds", "nan"], "seconds"),
    (["--seconds", "inf"], "seconds: expected a finite number of at least 1, got inf"),
    (["--quick"], "not allowed with"),
    (["--plots", "no/such/directory/x"], "plots: no/such/directory/x cannot be made a folder"),
]
BAD = [(["--toy", *a], n) for a, n in BOTH + SINGLE] + [(["sweep", "--toy", *a], n) for a, n in BOTH + SWEEP]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        *BAD,
        (["sweeep"], "expected one of the commands sweep, gpu, compare, plots, readme, got 'sweeep'"),
        (["--quick", "--runs", "2"], "arguments: --runs 2 (see python -m bench sweep --help)"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert err.count("\n") == 1
    assert named in err
    assert not [path for path in OUT.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("argv", "said"), [(["--device", "cuda"], "device: there is no GPU"), (["gpu"], "there is no GPU")]
)
def test_without_a_gpu_it_is_one_line_and_exit_code_2(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "gpu_unavailable", lambda: "there is no GPU")
    assert _main(*argv) == 2
    assert capsys.readouterr().err == f"bench: {said}\n"


def test_a_run_that_is_not_told_where_leaves_its_files_in_out_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "extra_bytes", lambda name, case: 10**6)
    assert (
        _main("sweep", "--toy", "--classes", "500", "2000", "--rounds", "1", "--peers", "ours", "eager") == 0
    )
    folder = OUT / "bench-sweep-toy"
    files = {
        OUT / "bench-sweep-toy.jsonl",
        *(folder / f"{n}.png" for n in ("classes", "classes-forward")),
    }
    assert {path for path in OUT.rglob("*") if path.is_file()} == files
    said = capsys.readouterr().out
    assert all(f"wrote {path}\n" in said for path in files)


def test_a_sweep_measures_what_its_options_say(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    argv = ["--rows", "4", "--margin", "arcface", "--target-gradient", "detached", "--rounds", "1"]
    argv += ["--peers", "ours", "eager", "--json", str(path), "--plots", str(tmp_path / "plots")]
    assert _main("sweep", "--toy", *argv) == 0
    run = load(path)
    assert run.complete
    assert run.header.settings == {"seconds": plans.TOY_SWEEP.seconds}
    assert {(c.rows, c.backward) for c in run.cases()} == {(4, True), (4, False), (16, True), (16, False)}
    assert {(c.margin, c.target_gradient) for c in run.cases()} == {("arcface", "detached")}
    assert {n for rounds in _timed(run).values() for n in rounds} == {1}
    assert any(m.values for m in run.measurements if m.what == BYTES)


def test_without_matplotlib_a_sweep_has_no_pictures_unless_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "unavailable", lambda: "matplotlib is not installed")
    monkeypatch.setattr(command, "_measure", lambda *arguments: 0 if arguments[-1] is None else 3)
    assert _main("sweep", "--toy") == 0
    assert capsys.readouterr().err == "no pictures: matplotlib is not installed\n"
    assert _main("sweep", "--toy", "--plots", "pictures") == 2
    assert capsys.readouterr().err == "bench: plots: matplotlib is not installed\n"


def test_quick_alone_is_the_quick_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(command, "_measure", lambda *arguments: asked.append(arguments) or 0)
    for argv in (
        ["--quick", "--rounds", "1"],
        ["--rounds", "1", "--quick"],
        ["sweep", "--quick", "--rounds", "1"],
    ):
        assert _main(*argv) == 0
    plan: Plan = asked[0][0]
    assert [a[0] for a in asked] == [plan] * 3
    assert {a[2] for a in asked} == {"bench-sweep-quick"}
    assert (plan.seconds, plan.rounds) == (plans.QUICK.seconds, 1)


def test_the_gpu_command_writes_one_file_with_the_cards_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU in place of the card; everything else is what runs there."""
    sweep = plans.Sweep(TOY, TOY, ("ours",), 2, 60, classes=(100, 200), rows=(4, 8), directions=(True,))
    monkeypatch.setattr(plans, "GPU", sweep)
    monkeypatch.setattr(machine, "gpu_unavailable", lambda: None)
    monkeypatch.setattr(machine, "describe_gpu", lambda: {"card": "NVIDIA H100 80GB HBM3"})
    monkeypatch.setattr(memory, "unavailable", lambda device: "not here")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert _main("gpu", "--peers", "ours", "eager", "liger") == 0
    (path,) = tmp_path.glob("*.jsonl")
    assert path.name == "gpu-nvidia-h100-80gb-hbm3.jsonl"
    run = load(path)
    assert {(c.rows, c.classes) for c in run.cases()} == {(4, 100), (4, 200), (8, 100), (8, 200)}
    assert {m.status for m in run.measurements if m.peer == "liger"} == {UNAVAILABLE}


def test_the_gpu_sweep_has_centers_in_both_dtypes_and_leaves_time_for_tuning() -> None:
    plan = plans.gpu_plan(plans.GPU)
    cases = [shape.case for shape in plan.shapes]
    assert len(cases) == len(set(cases)) == 12
    assert {c.dtype for c in cases if c.rows == 1024} == {"float32", "bfloat16"}
    assert plan.seconds + 120 <= 570
    assert [c.flops for c in cases] == sorted(c.flops for c in cases)


def test_a_wrong_peer_is_not_timed_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, later, path = f"{STRANGE}:SHIFTED", f"{STRANGE}:WRONG_LATER", tmp_path / "result.jsonl"
    argv = ["--classes", str(GATE_CLASSES + 1), "--rows", "4", "--no-memory", "--json", str(path)]
    assert _main("--toy", *argv, "--peers", "eager", wrong, later, "ours") == 1
    run = load(path)
    assert {gate.peer for gate in run.gates if not gate.passed} == {wrong}
    assert set(_timed(run)) == {"eager", "ours"}
    (lost,) = (m for m in run.measurements if m.status == FAILED)
    assert (lost.peer, "its loss at this size is" in str(lost.why)) == (later, True)
    out = capsys.readouterr().out
    assert "FAILED: its answer is wrong" in out
    assert f"{later}: failed: " in out


def test_options_of_a_single_case_reach_its_records(tmp_path: Path) -> None:
    path = tmp_path / "result.jsonl"
    argv = ["--rows", "4", "--classes", "30", "--features", "8", "--margin", "arcface", "--scale", "16"]
    argv += ["--target-gradient", "detached", "--rounds", "2", "--runs", "2", "--workspace-bytes", "64"]
    argv += [
        "--peers",
        "ours",
        "eager",
        "--no-memory",
        "--spin",
        "--json",
        str(path),
        "--autocast",
        "bfloat16",
    ]
    assert _main("--toy", *argv) == 0
    run = load(path)
    (case,) = run.cases()
    assert (case.rows, case.classes, case.features) == (4, 30, 8)
    assert (case.device, case.dtype, case.autocast) == ("cpu", "float32", "bfloat16")
    assert (case.margin, case.scale, case.target_gradient) == ("arcface", 16, "detached")
    assert _timed(run) == {"ours@64": [2, 2], "eager": [2, 2]}
    assert run.header.settings == {"spin": True, "keep_memory": False}
    assert {m.what for m in run.measurements} == {SECONDS}
    assert run.header.command == " ".join(["python", "-m", "bench", "--toy", *argv])


@pytest.mark.skipif(measure.cannot_keep_memory() is not None, reason=str(measure.cannot_keep_memory()))
def test_keep_memory_starts_again_with_another_malloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    argv = ["--toy", "--keep-memory", "--no-memory", "--peers", "ours", "--json", str(path)]
    assert _main(*argv) == 0
    assert load(path).header.settings["keep_memory"]
    assert not measure.keeps_memory()


def test_the_toy_command_runs_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    argv = [sys.executable, "-m", "bench", "--toy", "--json", str(path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = load(path)
    here = [n for n, p in peers.PEERS.items() if p.why_not(peers.supported_case(p, TOY)) is None]
    assert {"ours", "eager", "compiled", "torch_linear"} <= set(here)
    assert _timed(run) == {name: [3] for name in here}
    assert {gate.peer for gate in run.gates} == {*here, "ours@0"}
    held = run.at(TOY, BYTES)
    assert held["ours@0"].values or held["ours@0"].status == SKIPPED
    assert "extra MB" in done.stdout
    assert done.stdout.splitlines()[-1] == TOY_NOTE
