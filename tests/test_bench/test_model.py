"""The model of a step on a GPU that is not here: what it counts, and how it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import model
from bench.__main__ import main
from bench.cases import Case
from bench.records import BYTES, ROOFLINE, load
from expface_kernels.workshop import costs

H100 = costs.GPUS["h100"]


def test_operators_are_counted_by_what_they_touch() -> None:
    a = torch.empty(4, 8, device="meta")
    with model.Operators() as seen:
        product = a @ a.T  # reads a twice (the second time as a view), writes (4, 4)
        product.mul_(2)  # reads and writes
        torch.empty(100, device="meta")
        product[torch.arange(2, device="meta")]
    gathered = 2 * (2 * 4 * 4) + 16
    counted = costs.Costs(tuple(seen.steps), 0, 0)
    assert counted.flops == 2 * 4 * 4 * 8
    assert counted.moved == 2 * 128 + 64 + 2 * 64 + 16 + gathered  # 16: arange writes
    assert counted.milliseconds(H100) == pytest.approx(1e3 * counted.moved / (H100.bandwidth * 1e12))


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_eager_head_makes_three_products_and_holds_its_logits(
    dtype: torch.dtype, target_gradient: str
) -> None:
    case = Case(1024, 100_000, 512, target_gradient=target_gradient)
    logits = case.rows * case.classes * 4  # float32 after the product
    eager = model.eager_costs(case, dtype)
    assert eager.flops == case.flops
    assert 2 * logits < eager.extra < 6 * logits
    assert eager.moved > 10 * logits


def test_its_json_holds_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    argv = ["--model", "h100", "--rows", "256", "--classes", "100000", "--features", "128"]
    assert main([*argv, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    run = load(path)
    assert run.header.settings["gpu"] == "h100"
    (case,) = run.cases(ROOFLINE)
    assert case.dtype == "bfloat16"
    roofline, held = run.at(case, ROOFLINE)["eager"], run.at(case, BYTES)[f"ours@{256 * 2**20}"]
    assert f"{1e3 * roofline.values[0]:.3f}" in out
    assert f"peak extra memory {held.values[0] / 1e6:.0f} MB" in out


@pytest.mark.parametrize(
    ("card", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce", None)],
)
def test_the_roofline_of_a_card_is_no_less_than_its_products_take(card: str, name: str | None) -> None:
    case = Case(256, 100_000, 512, device="cuda", autocast="bfloat16")
    seconds = model.seconds(case, 0, card)
    assert (seconds is None) == (name is None)
    if name is not None and seconds is not None:  # four products of 2·B·C·D at 16 bit
        assert seconds >= 8 * case.rows * case.classes * case.features / (costs.GPUS[name].half * 1e12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "h100", "--dtype", "float64"], "dtype: expected one of ['bfloat16'"),
        (["--model", "abacus"], "model: expected one of ['h100'"),
        (["--model", "h100", "--rounds", "3"], "rounds: --model counts"),
        (["--model", "h100", "--spin"], "spin: --model counts"),
        (["--model", "h100", "--peers", "ours"], "peers: --model counts"),
        (["--model", "h100", "--no-memory"], "no-memory: --model counts"),
        (["--model", "h100", "--json", "no/such/directory/x.json"], "no/such/directory"),
    ],
)
def test_what_has_no_model_is_refused(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    assert text in capsys.readouterr().err
