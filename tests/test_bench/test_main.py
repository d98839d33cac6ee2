from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import allocator, cuda, memory, peers, plans, plots
from bench.__main__ import main as bench_main
from bench.cases import TOY
from bench.commands.options import OUT
from bench.commands.single import TOY_NOTE, TOY_ROUNDS
from bench.compare import load
from bench.gate import GATE_CLASSES, GATE_ROWS
from bench.peers.base import terms
from bench.result import Result
from bench.sweep import Plan
from bench.sweep_result import Sweep
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
        return bench_main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--peers", "nobody"], "nobody"),
        (["--peers", "ours@many"], "ours@many"),
        (["--peers", "no.such.module:PEER"], "no.such.module"),
        (["--peers", f"{STRANGE}:NOTHING"], "NOTHING"),
        (["--peers", f"{STRANGE}:UNABLE"], "it is Sunday"),
        (["--rows", "0"], "rows"),
        (["--classes", "-3"], "classes"),
        (["--features", "0"], "features"),
        (["--rows", "many"], "rows"),
        (["--scale", "0"], "scale"),
        (["--scale", "nan"], "scale"),
        (["--margin", "none"], "margin"),
        (["--target-gradient", "both"], "target-gradient"),
        (["--rounds", "0"], "rounds"),
        (["--runs", "0"], "runs"),
        (["--workspace-bytes", "-1"], "workspace-bytes"),
        (["--memory-classes", "0"], "classes"),
        (["--memory-classes", str(10**13)], "fit"),
        (["--classes", str(10**13)], "fit"),
        (["--device", "tpu"], "device"),
        (["--dtype", "int8"], "dtype"),
        (["--autocast", "float32"], "autocast"),
        (["--json", "no/such/directory/x.json"], "no/such/directory"),
        (["--json", "."], "json: expected a file, got the directory ."),
        (["--peers", ".x:y"], "'.x:y' cannot be imported"),
        (["--peers", f"{STRANGE_IMPORT}:PEER"], "cannot be imported: not today"),
        (["--peers", f"ours@{2**63}"], "workspace-bytes: expected at most 2**63 - 1"),
        (["--workspace-bytes", "99999999999999999999"], "workspace-bytes: expected at most 2**63 - 1"),
        (["--peers", "os:getcwd"], "expected 'os:getcwd' to be a bench.peers.base.Peer"),
        (["--unknown"], "unknown"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("--toy", *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert err.count("\n") == 1
    assert named in err
    assert not OUT.exists()


def test_without_a_gpu_cuda_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: "there is no GPU")
    assert _main("--device", "cuda") == 2
    assert capsys.readouterr().err == "bench: device: there is no GPU\n"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--peers", "nobody"], "nobody"),
        (["--peers", f"{STRANGE}:UNABLE"], "it is Sunday"),
        (["--classes", "0"], "classes"),
        (["--rows", "many"], "rows"),
        (["--features", "-1"], "features"),
        (["--classes", str(10**13)], "fit"),
        (["--rounds", "0"], "rounds"),
        (["--seconds", "nan"], "seconds"),
        (["--seconds", "inf"], "seconds: expected a finite number, got inf"),
        (["--peers", ".x:y"], "'.x:y' cannot be imported"),
        (["--peers", f"ours@{2**63}"], "workspace-bytes"),
        (["--margin", "none"], "margin"),
        (["--quick"], "not allowed with"),
        (["--json", "no/such/directory/x.json"], "no/such/directory"),
        (["--json", "."], "json: expected a file, got the directory ."),
        (["--plots", "no/such/directory/x"], "no/such/directory"),
        (["--plots", __file__], "plots: expected a directory, got the file"),
        (["--unknown"], "unknown"),
    ],
)
def test_bad_input_of_a_sweep_is_one_line_too(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("sweep", "--toy", *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert err.count("\n") == 1
    assert named in err
    assert not OUT.exists()


@pytest.mark.parametrize(
    ("argv", "stem", "pictures"),
    [
        (["--toy", "--no-memory"], "bench-toy", []),
        (
            ["sweep", "--toy", "--classes", "500", "2000"],
            "bench-sweep-toy",
            ["classes-memory.png", "classes-seconds.png", "frontier.png", "speedups.png"],
        ),
    ],
    ids=["single", "sweep"],
)
def test_a_run_that_is_not_told_where_leaves_its_files_in_out_and_says_so(
    argv: list[str], stem: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(*argv, "--rounds", "1", "--peers", "ours", "eager") == 0
    files = [Path("out", f"{stem}.json"), *(Path("out", stem, name) for name in pictures)]
    assert {path for path in Path("out").rglob("*") if path.is_file()} == set(files)
    assert load(files[0]).command == " ".join(
        ["python", "-m", "bench", *argv, "--rounds", "1", "--peers", "ours", "eager"]
    )
    said = capsys.readouterr().out
    for path in files:
        assert f"wrote {path}\n" in said


def test_git_ignores_what_runs_leave() -> None:
    assert f"{OUT}/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize(("argv", "option"), [(["--toy"], "json"), (["sweep", "--toy"], "plots")])
def test_where_out_cannot_be_made_nothing_is_measured(
    argv: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").write_text("")
    assert _main(*argv) == 2
    assert capsys.readouterr() == ("", f"bench: {option}: expected a directory, got the file out\n")


def test_without_matplotlib_a_sweep_has_no_pictures_unless_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "unavailable", lambda: "matplotlib is not installed")
    monkeypatch.setattr("bench.commands.sweep._run", lambda plan, path, folder: 0 if folder is None else 3)
    assert _main("sweep", "--toy") == 0
    assert capsys.readouterr().err == "no pictures: matplotlib is not installed\n"
    assert _main("sweep", "--toy", "--plots", "pictures") == 2
    assert capsys.readouterr().err == "bench: plots: matplotlib is not installed\n"


@pytest.mark.parametrize("argv", [["--quick", "--rounds", "1"], ["--rounds", "1", "--quick"]], ids=str)
def test_quick_alone_is_the_quick_sweep(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Plan] = []
    written: list[tuple[Path, Path | None]] = []

    def noted(plan: Plan, path: Path, folder: Path | None) -> int:
        asked.append(plan)
        written.append((path, folder))
        return 0

    monkeypatch.setattr("bench.commands.sweep._run", noted)
    assert _main(*argv) == 0
    assert _main("sweep", *argv) == 0
    assert asked[0] == asked[1]
    assert written == [(Path("out/bench-sweep-quick.json"), Path("out/bench-sweep-quick"))] * 2
    assert (asked[0].seconds, asked[0].rounds) == (plans.QUICK.seconds, 1)
    assert {stop.case for stop in asked[0].stops} <= set(plans.QUICK.grid.cases())


@pytest.mark.parametrize(
    ("argv", "named"), [(["--toy"], "--toy: not allowed with"), (["--runs", "2"], "arguments: --runs 2")]
)
def test_what_quick_cannot_be_combined_with_is_one_line(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main("--quick", *argv) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.endswith("(see python -m bench sweep --help)\n")
    assert err.count("\n") == 1


def test_a_folder_that_takes_no_file_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(dir: Path) -> None:  # as /proc does, where modes let root write
        raise FileNotFoundError(errno.ENOENT, "No such file", str(dir))

    monkeypatch.setattr("bench.commands.options.tempfile.TemporaryFile", refused)
    assert _main("sweep", "--toy", "--plots", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"bench: plots: {tmp_path} cannot be written to (No such file)\n"


@pytest.mark.parametrize("argv", [[], ["sweep"]], ids=["single", "sweep"])
def test_what_may_not_be_written_is_told_before_anything_is_measured(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr("bench.commands.options.os.access", lambda path, mode: False)
    assert _main(*argv, "--toy", "--json", str(path)) == 2
    assert capsys.readouterr().err == f"bench: json: {tmp_path} cannot be written\n"
    path.write_text("")
    assert _main(*argv, "--toy", "--json", str(path)) == 2
    assert capsys.readouterr().err == f"bench: json: {path} cannot be written\n"


def test_options_of_a_sweep_reach_its_result(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    argv = ["--rows", "4", "--margin", "arcface", "--target-gradient", "detached", "--rounds", "1"]
    argv += ["--peers", "ours", "eager", "--json", str(path), "--plots", str(tmp_path / "plots")]
    assert _main("sweep", "--toy", *argv) == 0
    sweep = Sweep.from_data(json.loads(path.read_text()))
    assert sweep.complete
    assert [axis.varies for axis in sweep.axes] == ["rows"]
    assert {point.case.rows for point in sweep.points} == {4, 16}
    assert {point.case.backward for point in sweep.points} == {True, False}
    assert {(p.case.margin, p.case.target_gradient) for p in sweep.points} == {("arcface", "detached")}
    assert {len(point.seconds) for point in sweep.points} == {1}
    assert all(point.extra_bytes is not None for point in sweep.points)
    assert {"frontier.png", "speedups.png"} <= {p.name for p in (tmp_path / "plots").iterdir()}


def test_a_sweep_with_a_wrong_peer_measures_the_others_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "unavailable", lambda device: "not here")
    path, wrong = tmp_path / "sweep.json", f"{STRANGE}:SHIFTED"
    argv = ["--classes", "500", "--forward-only", "--peers", "eager", wrong, "--json", str(path)]
    assert _main("sweep", "--toy", *argv) == 1
    sweep = Sweep.from_data(json.loads(path.read_text()))
    assert {point.peer for point in sweep.points if point.seconds} == {"eager"}
    assert {point.reason for point in sweep.points if point.peer == "eager"} == {"not here"}


def test_a_wrong_peer_is_not_measured_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, path = f"{STRANGE}:SHIFTED", tmp_path / "result.json"
    assert _main("--toy", "--peers", "ours", wrong, "--json", str(path)) == 1
    result = Result.from_json(path.read_text())
    assert {gate.peer: gate.passed for gate in result.gates} == {"ours": True, wrong: False}
    assert set(result.runs[0]) == {"ours"}
    assert {entry.peer for entry in result.memory} == {"ours"}
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["RAISING_AT_FIRST", "RAISING_WHEN_TIMED"])
def test_a_peer_that_fails_after_the_gate_costs_nobody_else_a_number(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, path = f"{STRANGE}:{name}", tmp_path / "result.json"
    argv = ["--classes", str(GATE_CLASSES + 1), "--rows", "4", "--rounds", "2", "--runs", "2"]
    argv += ["--peers", "eager", failing, "ours", "--no-memory", "--json", str(path)]
    assert _main("--toy", *argv) == 1
    result = Result.from_json(path.read_text())
    assert all(gate.passed for gate in result.gates)
    assert result.failed == {failing: "RuntimeError: out of order at this size"}
    assert [{peer: len(seconds) for peer, seconds in run.items()} for run in result.runs] == [
        {"eager": 2, "ours": 2}
    ] * 2
    out = capsys.readouterr().out
    assert "timing of tests.test_bench.strange_peers" in out
    assert "FAILED: RuntimeError: out of order at this size" in out


@pytest.mark.parametrize("name", ["RAISING_AT_FIRST", "RAISING_WHEN_TIMED"])
def test_where_all_fail_after_the_gate_the_file_says_so(name: str, tmp_path: Path) -> None:
    failing, path = f"{STRANGE}:{name}", tmp_path / "result.json"
    argv = ["--classes", str(GATE_CLASSES + 1), "--rows", "4", "--no-memory", "--json", str(path)]
    assert _main("--toy", *argv, "--peers", failing) == 1
    result = Result.from_json(path.read_text())
    assert (set(result.failed), result.runs) == ({failing}, ())


def test_a_peer_with_another_loss_at_the_timed_size_is_not_timed(tmp_path: Path) -> None:
    wrong, path = f"{STRANGE}:WRONG_LATER", tmp_path / "result.json"
    argv = ["--classes", str(GATE_CLASSES + 1), "--rows", "4", "--no-memory", "--json", str(path)]
    assert _main("--toy", *argv, "--peers", "ours", wrong, "eager") == 1
    result = Result.from_json(path.read_text())
    assert all(gate.passed for gate in result.gates)
    assert "its loss at this size is" in result.failed.pop(wrong)
    assert not result.failed
    assert set(result.runs[0]) == {"ours", "eager"}


def test_a_peers_chunk_is_that_of_the_timed_size(tmp_path: Path) -> None:
    rows, path = GATE_ROWS + 36, tmp_path / "result.json"
    argv = ["--rows", str(rows), "--rounds", "1", "--no-memory", "--json", str(path)]
    assert _main("--toy", *argv, "--peers", "torch_linear_chunked") == 0
    (gate,) = Result.from_json(path.read_text()).gates
    assert f"chunks of {rows} rows" in gate.label


def test_options_reach_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[None] = []  # not for real: it would hold for all tests of this process
    monkeypatch.setattr(allocator, "keep_freed", lambda: told.append(None))
    path = tmp_path / "result.json"
    argv = ["--rows", "4", "--classes", "30", "--features", "8", "--margin", "arcface", "--scale", "16"]
    argv += ["--target-gradient", "detached", "--rounds", "2", "--runs", "2", "--workspace-bytes", "64"]
    argv += ["--peers", "ours", "eager", "--no-memory", "--spin", "--keep-memory", "--json", str(path)]
    argv += ["--autocast", "bfloat16"]
    assert _main("--toy", *argv) == 0
    result = Result.from_json(path.read_text())
    case = result.case
    assert (case.rows, case.classes, case.features) == (4, 30, 8)
    assert (case.device, case.dtype, case.autocast) == ("cpu", "float32", "bfloat16")
    assert (case.margin, case.scale, case.target_gradient) == ("arcface", 16, "detached")
    assert [{peer: len(seconds) for peer, seconds in run.items()} for run in result.runs] == [
        {"ours@64": 2, "eager": 2}
    ] * 2
    assert result.spin
    assert result.keep_memory
    assert told == [None]
    assert result.memory == ()


def test_the_toy_command_runs_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--toy", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = Result.from_json(path.read_text())
    assert result.case == TOY
    here = [name for name, peer in peers.PEERS.items() if peer.why_not(terms(peer, TOY)) is None]
    assert {"ours", "eager", "compiled", "torch_linear"} <= set(here)
    assert [gate.peer for gate in result.gates] == here
    assert set(result.skipped) == set(peers.PEERS) - set(here)
    assert {len(seconds) for seconds in result.runs[0].values()} == {TOY_ROUNDS}
    assert "Peak extra memory" in done.stdout
    assert done.stdout.splitlines()[-1] == TOY_NOTE
    assert "mean nothing" in TOY_NOTE
