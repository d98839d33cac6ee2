"""What the machine is said to be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from expface_kernels import __version__, backends, machine

LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="read from Linux's /proc")


def test_everything_is_described_in_plain_values() -> None:
    found = json.loads(json.dumps(machine.describe(), allow_nan=False))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["expface_kernels"] in (__version__, None)
    assert found["backends"] == backends.available()
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["cpu"]["cores"] >= 1


def test_the_extension_tells_its_vector_code() -> None:
    found = machine.extension()
    assert found["instruction_set"] in found["instruction_sets"]
    assert found["thread_runtime"] in ("GOMP_parallel", "std::thread")


@LINUX
def test_memory_is_told_in_bytes() -> None:
    available, everything = machine.available_bytes(), machine.memory_bytes()
    assert available is not None
    assert everything == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < available < everything


@LINUX
def test_torchs_openmp_runtime_is_found_and_no_library_of_another_name() -> None:
    found = machine.openmp_runtimes()
    assert found is not None
    assert any("omp" in Path(path).name for path in found)
    assert all(Path(path).exists() for path in found)


@pytest.mark.parametrize(
    ("path", "is_openmp"),
    [
        ("/usr/lib/libgomp.so.1.0.0", True),
        ("/env/torch/lib/libgomp-a34b3233.so.1", True),
        ("/opt/intel/libiomp5.so", True),
        ("/usr/lib/llvm/libomp.so.5", True),
        ("/usr/lib/libcomposite.so", False),
        ("/home/libgomp/libother.so", False),
    ],
)
def test_runtimes_are_told_by_their_files_names(
    path: str, is_openmp: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 08:01 123   {path}\n7f02-7f03 rw-p 00000000 00:00 0\n")
    monkeypatch.setattr(machine, "Path", lambda name: maps)
    assert machine.openmp_runtimes() == ([path] if is_openmp else [])


def test_another_system_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda name: Path("/nowhere"))
    assert machine.available_bytes() is None
    assert machine.openmp_runtimes() is None
