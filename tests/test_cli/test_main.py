"""`python -m expface_kernels`: what is loaded, what is said, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expface_kernels import __version__, machine
from expface_kernels.__main__ import COMMANDS, main
from expface_kernels.backends import triton
from expface_kernels.workshop.costs import GPUS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--rows", "6", "--classes", "33", "--features", "16"]


def _main(*argv: str) -> int:
    """The exit code, whether it is returned or argparse's."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def _process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "a command of gradcheck, plan, curves, info"),
        (["--unknown"], "a command of gradcheck"),
        (["train"], "train"),
        (["gradcheck", "--unknown"], "unknown"),
        (["gradcheck", "--margin", "nothing"], "nothing"),
        (["gradcheck", "--margin", "arcface:28.6"], "radians"),
        (["gradcheck", "--margin", "no.such.module:X"], "no.such.module"),
        (["gradcheck", "--margin", "builtins:len"], "must return psi"),
        (["gradcheck", "--backend", "fast"], "fast"),
        (["gradcheck", "--dtype", "int8"], "int8"),
        (["gradcheck", "--target-gradient", "both"], "both"),
        (["gradcheck", "--rows", "0"], "rows"),
        (["gradcheck", "--classes", "many"], "many"),
        (["gradcheck", "--features", "1.5"], "1.5"),
        (["gradcheck", "--features", "1"], "argument --features: expected at least 2, got 1"),
        (["gradcheck", "--scale", "nan"], "argument --scale: expected"),
        (["gradcheck", "--scale", "1e9"], "argument --scale: expected"),
        (["gradcheck", "--batches", "hard"], "hard"),
        (["gradcheck", "--device", "nowhere"], "nowhere"),
        (["gradcheck", "--device", "meta"], "meta"),
        (["gradcheck", "--seed", "9" * 20], "seed: expected at most 2**63 - 1"),
        (["gradcheck", "--workspace-bytes", "8XB"], "8XB"),
        (["gradcheck", "--classes", "10G", "--rows", "1M"], "fit"),
        (["gradcheck", "--json", "no/such/directory/x.json"], "no/such/directory"),
        (["plan"], "classes"),
        (["plan", "--classes", "-3"], "classes"),
        (["plan", "--classes", "1M", "--memory-bytes", "0"], "argument --memory-bytes: expected"),
        (["plan", "--classes", "1000000000000000000", "--device", "h100"], "classes · features"),
        (["plan", "--classes", "1M", "--device", "h1000"], "h1000"),
        (["plan", "--classes", "1M", "--optimizer", "lion"], "lion"),
        (
            ["plan", "--classes", "1M", "--optimizer", "sparse-adam"],
            "argument --optimizer: sparse-adam takes",
        ),
        (["plan", "--classes", "1M", "--sample-rate", "2"], "argument --sample-rate: expected"),
        (["plan", "--classes", "1M", "--device", "h100", "--dtype", "float64"], "dtype"),
        (["plan", "--classes", "1M", "--gflops", "100"], "argument --gflops, --gbytes: expected both"),
        (["plan", "--classes", "1M", "--gflops", "0", "--gbytes", "1"], "gflops"),
        (["plan", "--classes", "1M", "--device", "h100", "--gflops", "1", "--gbytes", "1"], "gflops"),
        (
            ["plan", "--classes", "1M", "--memory-bytes", "8G", "--reserved-bytes", "9G"],
            "argument --reserved-bytes: expected less than 90% of the device's 8,000,000,000 bytes",
        ),
        (["curves", "--out", __file__], "argument --out: expected a directory, got the file"),
        (["curves", "--out", "/proc/x"], "argument --out: expected a directory that can be made"),
        (["info", "--json", "."], "json"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m expface_kernels")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.skipif(triton.TritonBackend().unavailable() is None, reason="triton can run here")
def test_a_backend_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("gradcheck", "--backend", "triton") == 2
    err = capsys.readouterr().err
    assert triton.TritonBackend().unavailable() in err
    assert "TRITON_INTERPRET=1" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("gradcheck", "--device", "cuda") == 2
    assert "argument --device: torch sees no GPU here, got 'cuda'" in capsys.readouterr().err


def test_help_lists_every_command_and_loads_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    loaded = "[name for name in ('rich', 'expface_kernels.testing', 'triton') if name in sys.modules]"
    done = _process(
        "import sys; from expface_kernels import __main__ as m\n"
        "try: m.main(['--help'])\nexcept SystemExit: pass\n"
        f"print({loaded})"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_rich_one_line_names_the_extra() -> None:
    done = _process("import sys; sys.modules['rich'] = None\nfrom expface_kernels.__main__ import main\n"
                    "sys.exit(main(['info']))")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "python -m expface_kernels info: needs rich: pip install 'expface_kernels[cli]'\n"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("--version") == 0
    assert capsys.readouterr().out == f"expface_kernels {__version__}\n"


@pytest.mark.parametrize(
    ("policy", "told"), [(None, "may spin"), ("active", "may spin"), ("passive", "sleep")]
)
def test_info_says_what_waiting_threads_do(
    policy: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert _main("info") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting threads"))
    assert line.removeprefix("waiting threads").lstrip().startswith(told)


def test_a_right_margin_passes_and_so_says_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    argv = ["--margin", "arcface:0.4", "--target-gradient", "detached", "--scale", "30", "--seed", "3"]
    assert _main("gradcheck", *SMALL, *argv, "--json", str(path)) == 0
    shown = capsys.readouterr().out
    assert "The policy holds." in shown
    assert "FAILED" not in shown
    found = json.loads(path.read_text())
    assert found["passed"] is True
    assert found["setting"]["margin"] == "ArcFace(m=0.4, boundary='none')"
    assert (found["setting"]["rows"], found["setting"]["classes"], found["setting"]["features"]) == (
        6,
        33,
        16,
    )
    assert (found["setting"]["scale"], found["setting"]["seed"]) == (30, 3)
    kinds = ["random", "near_centre", "opposite", "learnt", "spread"]
    assert [one["kind"] for one in found["batches"]] == kinds
    assert found["machine"]["versions"]["torch"]


def test_a_margin_that_is_wrong_fails_with_exit_code_1() -> None:
    """A user's own, found in the directory where the command is called; its slope is not its own."""
    argv = ["--margin", "tests.test_cli.own_margins:WrongSlope", *SMALL, "--batches", "random"]
    done = subprocess.run(
        [sys.executable, "-m", "expface_kernels", "gradcheck", *argv],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "FAILED random: finite differences" in done.stdout
    assert "FAILED random: margin's slope" in done.stdout
    assert done.stdout.count("FAILED") == 4  # both in the table, and in words


def test_a_margin_that_takes_float64_alone_is_judged_and_so_it_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--margin", "tests.test_cli.own_margins:OfATable", *SMALL, "--batches", "random"]
    assert _main("gradcheck", *argv) == 0
    assert "takes no float32 angles: eager's psi is computed in float64." in capsys.readouterr().out
    assert _main("gradcheck", *argv, "--dtype", "float64") == 0
    assert "angles" not in capsys.readouterr().out


@pytest.mark.skipif(triton.interpreted(), reason="this process has it")
def test_the_triton_backend_is_judged_in_its_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["gradcheck", *SMALL, "--backend", "triton", "--batches", "random", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "expface_kernels", *argv],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    setting = json.loads(path.read_text())["setting"]
    assert (setting["backend"], setting["device"]) == ("triton", "cpu")


def test_a_job_that_fits_and_one_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    argv = ["plan", "--classes", "1M", "--features", "128", "--gflops", "100", "--gbytes", "10"]
    assert _main(*argv, "--memory-bytes", "16G", "--json", str(path)) == 0
    fits = json.loads(path.read_text())
    assert "it fits" in capsys.readouterr().out
    assert _main(*argv, "--memory-bytes", "1.3G", "--ranks", "1", "--json", str(path)) == 1
    shown, does_not = capsys.readouterr().out, json.loads(path.read_text())
    assert "it does not fit. The fewest devices: 2." in shown
    assert (fits["fits"], does_not["fits"], does_not["smallest_ranks"]) == (True, False, 2)
    assert fits["peak_bytes"] == does_not["peak_bytes"]
    assert fits["seconds"] == sum(work["seconds"] for work in fits["work"])
    always = sum(item["bytes"] for item in fits["items"] if item["when"] == "always")
    assert fits["peak_bytes"] >= always > 3 * 1_000_000 * 128 * 4


def test_rates_are_measured_where_none_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert _main("plan", "--classes", "1k", "--features", "16", "--batch", "8", "--json", str(path)) == 0
    rates = json.loads(path.read_text())["cpu_rates"]
    assert all(value > 0 for value in rates.values())
    shown = capsys.readouterr().out
    assert f"The cpu backend at {rates['flops'] / 1e9:.3g} GFLOP/s" in shown
    assert f"as measured on this {machine.cpu_model()}" in shown


def test_a_gpus_plan_says_whose_rates_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("plan", "--classes", "1M", "--device", "h200") == 0
    shown = capsys.readouterr().out
    assert "the triton backend" in shown
    assert "of H200, not measured here: " in shown
    assert f"{GPUS['h200'].half:g} TFLOP/s in 16 bit" in shown


def test_info_shows_what_its_json_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "info.json"
    assert _main("info", "--json", str(path)) == 0
    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    for value in (found["versions"]["torch"], found["cpu"]["instruction_set"], *found["openmp_runtimes"]):
        assert value in shown
    for name, state in found["backends"].items():
        assert f"backend {name}" in shown
        assert state in shown
