"""The tuning tool without a GPU: candidates that fit, the whole loop with a clock that is not one, the table.

B rows · C classes · D features
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.triton import tuning
from expface_kernels.backends.triton.launch import Call
from expface_kernels.backends.triton.plan import PAD
from expface_kernels.backends.triton.tuning import ROLES, Tile
from expface_kernels.workshop import autotune
from expface_kernels.workshop.autotune import PRODUCTS, Machine, Step, fastest, record
from expface_kernels.workshop.candidates import (
    UNKNOWN_SHARED,
    Setting,
    candidates,
    shared_bytes,
    why_not,
)
from expface_kernels.workshop.machine_code import LIMITS
from tests.cases import INTERPRETED

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HOPPER = Setting("sm_90", 512, BF16, BF16, "ieee")
SMALL = Tile(64, 64, 32, 4, 2)


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("features", [128, 500, 1024])
@pytest.mark.parametrize("role", ROLES)
def test_candidates_fit_shared_memory_and_the_padding(role: str, features: int, arch: str) -> None:
    limit = LIMITS[arch].block_shared
    options = autotune.parser().parse_args(["--features", str(features), "--dtype", *PRODUCTS])
    for _, setting in autotune.settings(arch, options):
        found = list(candidates(role, setting, limit))
        assert found[0] == getattr(setting.ruled(), role)
        assert len(found) == len(set(found)) > 5
        for tile in found:
            assert shared_bytes(role, tile, setting) <= limit
            rows = tile.bm if role.startswith("forward") else tile.bk if role == "weight" else tile.bn
            assert PAD % rows == 0
            # P' has room for whole tiles of classes only if they divide its chunks.
            assert role.startswith("forward") or PAD % tile.bm == 0


@pytest.mark.parametrize("arch", ["sm_120", "sm_121"])
@pytest.mark.parametrize("dtypes", PRODUCTS.values(), ids=str)
def test_consumer_cards_get_amperes_tiles_which_fit_their_shared_memory(
    dtypes: tuple[torch.dtype, torch.dtype], arch: str
) -> None:
    setting = Setting(arch, 512, *dtypes, "tf32x3")
    ruled, amperes = setting.ruled(), dataclasses.replace(setting, arch="sm_80").ruled()
    assert dataclasses.replace(ruled, forward=amperes.forward) == amperes
    for role in ROLES:
        assert shared_bytes(role, getattr(setting.ruled(), role), setting) <= UNKNOWN_SHARED


def test_less_shared_memory_leaves_fewer_candidates() -> None:
    counts = [len(list(candidates("forward", HOPPER, limit))) for limit in (50_000, 100_000, 232_448)]
    assert counts[0] < counts[1] < counts[2]


# What the compiler took for these tiles: the estimate is never less, and not much more.
@pytest.mark.parametrize(
    ("role", "arch", "product", "stored", "tile", "taken"),
    [
        ("probability", "sm_90", BF16, BF16, Tile(128, 128, 64, 8, 3), 98_304),
        ("forward", "sm_90", BF16, BF16, Tile(128, 128, 64, 8, 3), 81_920),
        ("forward", "sm_90", BF16, F32, Tile(128, 128, 32, 8, 4), 90_112),
        ("weight", "sm_90", F32, F32, Tile(128, 64, 32, 8, 3), 65_536),
        ("weight", "sm_80", BF16, F32, Tile(128, 128, 64, 8, 3), 65_536),
        ("probability", "sm_80", BF16, F32, Tile(128, 128, 32, 8, 3), 49_152),
        ("probability", "sm_80", F32, F32, Tile(64, 128, 32, 8, 2), 32_768),
        ("forward", "gfx942", BF16, BF16, Tile(128, 128, 64, 8, 2), 32_768),
    ],
)  # fmt: skip
def test_the_estimate_of_shared_memory_is_near_what_the_compiler_takes(
    role: str, arch: str, product: torch.dtype, stored: torch.dtype, tile: Tile, taken: int
) -> None:
    setting = Setting(arch, 512, product, stored, "tf32x3" if product == F32 else "ieee")
    assert taken <= shared_bytes(role, tile, setting) <= 1.25 * taken


@pytest.mark.parametrize(
    ("tile", "word"),
    [
        (Tile(256, 64, 64, 8, 2), "padded"),
        (Tile(128, 256, 64, 4, 2), "accumulators"),
        (Tile(64, 64, 64, 8, 2), "accumulators"),
        (Tile(128, 256, 64, 8, 9), "shared memory"),
    ],
)
def test_what_does_not_fit_says_why(tile: Tile, word: str) -> None:
    assert word in str(why_not("forward", tile, HOPPER, 232_448))
    assert "features" in str(
        why_not("forward", Tile(128, 128, 64, 8, 2), dataclasses.replace(HOPPER, features=32), 10**6)
    )


@pytest.mark.parametrize("role", ROLES)
def test_features_are_padded_to_the_widest_block_of_any_role(role: str) -> None:
    narrow = dict.fromkeys(ROLES, Tile(64, 16, 16, 4, 2))
    tiles = tuning.with_tiles(HOPPER.ruled(), narrow | {role: SMALL})
    x = torch.empty(4, 40, dtype=BF16, device="meta")
    with tuning.trying(tiles):
        call = Call(x, x, x[:, 0].long(), None, OpConfig(64.0, True, 0, False, None), "sm_90")
    assert call.features_pad == 64  # 48 were enough for blocks of 16


class Counted:
    """A clock by table: a launch takes what `seconds_of` says of its blocks."""

    def __init__(self, seconds_of: Callable[[dict[str, Any]], float]) -> None:
        self.seconds_of = seconds_of
        self.total = 0.0
        self.timed_blocks: list[tuple[int, int, int]] = []

    def timed(self, arguments: dict[str, Any], run: Callable[[], None]) -> None:
        run()
        self.timed_blocks.append((arguments["BM"], arguments["BN"], arguments["BK"]))
        self.total += self.seconds_of(arguments)

    def seconds(self) -> float:
        total, self.total = self.total, 0.0
        return total


TOY = ["--rows", "5", "--classes", "40", "--features", "24"]


def _toy(path: Path, *more: str) -> argparse.Namespace:
    return autotune.parser().parse_args([*TOY, "--output", str(path), *more])


def _machine(clock: Counted) -> Machine:
    return Machine("interpreter", 'a "toy"', "cpu", 10**6, clock)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "WARM_UPS", 0)
    monkeypatch.setattr(autotune, "ROUNDS", 1)


@interpreted
@pytest.mark.usefixtures("_one_round")
@pytest.mark.parametrize(
    ("dtype", "roles"),
    [("float32", ("forward", "weight")), ("float16-float32", ("forward_more", "probability"))],
)
def test_the_whole_loop_writes_a_table_that_calls_then_use(
    dtype: str, roles: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines = tmp_path / "tuned.json", []
    monkeypatch.setattr(autotune, "candidates", lambda *args: [SMALL])
    clock = Counted(lambda a: float(a["BM"]))
    autotune.measure(_toy(path, "--dtype", dtype, "--role", *roles), _machine(clock), lines.append)
    assert sum("ms" in line for line in lines) == 4, lines
    # Kept exponentials and maxima with the hardest: the role that has both runs twice.
    assert len(clock.timed_blocks) == (6 if "forward_more" in roles else 4)
    assert json.loads(path.read_text())["interpreter"]["measured_on"].startswith('a "toy", Triton ')
    monkeypatch.setattr(tuning, "table", lambda: json.loads(path.read_text()))
    found = tuning.blocks("interpreter", 24, *PRODUCTS[dtype], "tf32x3")
    assert {role for role in ROLES if getattr(found, role) == SMALL} == set(roles)
    assert tuning.blocks("interpreter", 32, *PRODUCTS[dtype], "tf32x3").forward != SMALL


@interpreted
@pytest.mark.usefixtures("_one_round")
def test_a_tile_that_computes_something_else_or_fails_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Step.of(Setting("interpreter", 24, F32, F32, "ieee"), 20, 100, "cpu")
    base = step.setting.ruled()
    run = Step.run
    lines: list[str] = []
    wrong, impossible, right = (Tile(128, 64, 64, 4, stages) for stages in (1, 2, 3))

    def broken(self: Step, role: str, tiles: tuning.Blocks) -> tuple[torch.Tensor, ...]:
        if tiles.weight == impossible:
            raise RuntimeError("out of resource:\n shared memory")
        out = run(self, role, tiles)
        return (*out[:3], out[3] * 1.001) if tiles.weight == wrong else out

    monkeypatch.setattr(Step, "run", broken)
    clock = Counted(lambda a: {1: 0.1, 2: 0.1, 3: 1.0}[a["num_stages"]] if a["BM"] == 128 else 2.0)
    assert fastest(step, "weight", [wrong, impossible, right], base, clock, lines.append) == right
    assert "2000 ms" in lines[0]
    assert "dw is off by 0.001 of its norm" in lines[1]
    assert "RuntimeError: out of resource: shared memory" in lines[2]
    assert "1000 ms" in lines[3]


@pytest.mark.parametrize("which", range(4))
def test_each_result_is_held_against_the_one_in_use(which: int) -> None:
    names = ("log l", "theta", "dx", "dw")
    wanted = [torch.arange(1.0, 9.0) for _ in names]
    assert autotune.disagreement(wanted, wanted, 1e-5) is None
    for bad in (wanted[which] * 1.001, wanted[which] * torch.nan, torch.zeros(8)):
        got = [*wanted[:which], bad, *wanted[which + 1 :]]
        assert str(autotune.disagreement(got, wanted, 1e-5)).startswith(f"{names[which]} is off by")


def test_nothing_is_measured_past_the_time_that_was_given(tmp_path: Path) -> None:
    path, lines = tmp_path / "tuned.json", []
    clock = Counted(lambda arguments: 1.0)
    autotune.measure(_toy(path, "--seconds", "-1"), _machine(clock), lines.append)
    assert lines == ["over -1 seconds: the rest is not measured"]
    assert not path.exists()


@interpreted
@pytest.mark.usefixtures("_one_round")
def test_without_time_the_tile_in_use_stays() -> None:
    step = Step.of(Setting("interpreter", 24, F32, F32, "ieee"), 5, 40, "cpu")
    base = step.setting.ruled()
    lines: list[str] = []
    clock = Counted(lambda a: float(a["BM"]))
    other = Tile(128, 64, 64, 4, 2)
    assert fastest(step, "weight", [other], base, clock, lines.append, until=-math.inf) == base.weight
    assert lines[1:] == ["  no time is left for the others"]


def test_the_time_that_was_given_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, shares = [100.0], []

    def measured(
        step: Step, role: str, tiles: object, base: tuning.Blocks, clock: object, tell: object, until: float
    ) -> Tile:
        shares.append(until - now[0])
        now[0] += shares[-1] / 2 if role == "forward" else shares[-1]
        tile: Tile = getattr(base, role)
        return tile

    monkeypatch.setattr(autotune, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(autotune, "fastest", measured)
    path = tmp_path / "tuned.json"
    options = _toy(
        path, "--dtype", "float32", "--role", "forward", "probability", "weight", "--seconds", "12"
    )
    autotune.measure(options, _machine(Counted(lambda a: 1.0)), print)
    assert shares == [4.0, 5.0, 5.0]  # what the first has left over is the others'


def test_the_nearest_candidates_come_first() -> None:
    ruled = HOPPER.ruled().forward
    found = [dataclasses.astuple(tile) for tile in candidates("forward", HOPPER, 232_448)]
    distances = [sum(a != b for a, b in zip(t, dataclasses.astuple(ruled), strict=True)) for t in found]
    assert distances == sorted(distances)
    assert distances[:2] == [0, 1]


def test_recording_keeps_the_rest_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    wide = Tile(128, 256, 64, 8, 3)
    record(path, HOPPER, "weight", wide, "a card")
    record(path, HOPPER, "forward", wide, "a card")
    record(path, dataclasses.replace(HOPPER, arch="sm_80", stored=F32), "forward", SMALL, "another")
    record(path, HOPPER, "weight", SMALL, "a card, later")
    small, large = dataclasses.asdict(SMALL), dataclasses.asdict(wide)
    assert json.loads(path.read_text()) == {
        "sm_90": {
            "measured_on": "a card, later",
            "tiles": {"512 bfloat16 bfloat16 ieee": {"weight": small, "forward": large}},
        },
        "sm_80": {
            "measured_on": "another",
            "tiles": {"512 bfloat16 float32 ieee": {"forward": small}},
        },
    }
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.json"]


def test_every_entry_of_the_packages_table_is_read_and_fits() -> None:
    for arch, entry in tuning.table().items():
        assert entry["measured_on"]
        for key, roles in entry["tiles"].items():
            features, *types, precision = key.split()
            setting = Setting(arch, int(features), *(getattr(torch, name) for name in types), precision)
            assert key == tuning.key(setting.features, setting.product, setting.stored, precision)
            for role, sizes in roles.items():
                tile, limit = Tile(**sizes), LIMITS[arch].block_shared if arch in LIMITS else 10**9
                ruled = getattr(setting.ruled(), role)
                assert tile == ruled or why_not(role, tile, setting, limit) is None


def test_the_table_is_installed_with_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'"expface_kernels.backends.triton" = \["tuned.json"\]', text)
    assert tuning.TUNED.is_file()


def test_without_a_gpu_it_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        autotune.main([])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m expface_kernels.workshop.autotune: there is no GPU")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["--features", "0"], ["--rows", "-1"], ["--classes", "x"], ["--dtype", "int8"], ["--role", "all"]],
)
def test_bad_input_is_one_line_and_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        autotune.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"python -m expface_kernels\.workshop\.autotune: argument {argv[0]}: .*\n", err)


def test_candidates_are_listed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--arch", "gfx942", "--features", "128", "500", "--dtype", "float32"]
    assert autotune.main(["--list", *sizes]) == 0
    text = capsys.readouterr().out
    for d, role in itertools.product((128, 500), ROLES):
        assert f"gfx942, D={d}, float32, {role}:\n  64x64x32, 4 warps, 2 stages\n" in text
    assert autotune.main(["--dry-run"]) == 0
    assert "\n  128x256x64, 8 warps, 3 stages\n" in capsys.readouterr().out
