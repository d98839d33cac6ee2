"""Datasets that change: classes added, dropped and reordered, with the optimizer state of those that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expface_kernels.checkpoint import (
    centres_of,
    class_mapping,
    load_centres,
    open_centres,
    remap,
    remap_classes,
    save_centres,
)
from expface_kernels.distributed.module import initialize
from expface_kernels.distributed.ranges import ClassRange
from tests.test_checkpoint.trained import OPTIMIZERS, STATE_NAMES, STEP, D, Head, fill_with_truth, truth
from tests.tolerances import ADAMAX_EPS, DRAWN_30_000

C = 37
MAPPING = [4, -1, 0, 36, -1, 5, 6, 1]


def trained(kind: str) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    head = Head(C)
    optimizer = OPTIMIZERS[kind](head.parameters())
    fill_with_truth(head.weight, optimizer, 0, C)
    return head.weight, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_rows_and_state_follow_their_class(kind: str, through_a_file: bool, tmp_path: Path) -> None:
    weight, optimizer = trained(kind)
    if through_a_file:
        save_centres(tmp_path / "old", weight, optimizer)
        with open_centres(tmp_path / "old") as old:
            save_centres(tmp_path / "new", remap_classes(old, MAPPING))
        source: Any = tmp_path / "new"
    else:
        source = remap_classes(centres_of(weight, optimizer), MAPPING)
    head = Head(len(MAPPING))
    optimizer = OPTIMIZERS[kind](head.parameters())
    load_centres(source, head.weight, optimizer)
    state = optimizer.state[head.weight]
    assert set(state) == STATE_NAMES[kind]
    for new, old in enumerate(MAPPING):
        for name, value in [("weight", head.weight), *state.items()]:
            if name == "step":
                assert value.item() == STEP
            elif old >= 0:
                assert torch.equal(value[new], truth(name, C)[old])
            elif name != "weight":
                assert not value[new].any()
    head.weight.grad = torch.ones_like(head.weight)
    optimizer.step()


def test_added_centres_are_drawn_like_new_ones() -> None:
    weight, _ = trained("sgd")
    count = 5000
    table = remap_classes(centres_of(weight), [-1] * count, seed=5)
    drawn = table.rows("weight", 0, count)
    assert drawn.std().item() == pytest.approx(0.01, rel=DRAWN_30_000)
    assert drawn.mean().abs().item() < 3e-4
    assert torch.unique(drawn, dim=0).shape[0] == count
    other = remap_classes(centres_of(weight), [-1] * count, seed=6).rows("weight", 0, count)
    assert torch.unique(torch.cat([drawn, other]), dim=0).shape[0] == 2 * count


def test_an_added_centre_is_neither_a_heads_first_one_nor_one_added_before() -> None:
    """Blocks of 1024 rows here, of 8192 in a head: by seed and block alone 1024·k + i was 8192·k + i."""
    count = 5 * 1024
    first = nn.Parameter(torch.empty(5 * 8192, D))
    initialize(first.data, ClassRange(0, first.shape[0]), seed=0)
    added = remap_classes(centres_of(first), [-1] * count).rows("weight", 0, count)
    assert torch.unique(torch.cat([first.detach(), added]), dim=0).shape[0] == first.shape[0] + count
    # A class that was added and moved, and one that is added in its place with another seed.
    once = remap_classes(centres_of(first), [0, -1])
    twice = remap_classes(once, [1, -1], seed=1).rows("weight", 0, 2)
    assert torch.equal(twice[0], once.rows("weight", 1, 2)[0])
    assert not torch.equal(twice[0], twice[1])


def test_added_centres_do_not_depend_on_how_they_are_read() -> None:
    weight, optimizer = trained("sgd")
    mapping = [-1 if c % 3 else c // 3 for c in range(90)]
    whole = remap_classes(centres_of(weight, optimizer), mapping)
    assert remap.BLOCK > 90
    for cut in (1, 7, 89):
        for name in ("weight", "optimizer.momentum_buffer"):
            parts = torch.cat([whole.rows(name, 0, cut), whole.rows(name, cut, 90)])
            assert torch.equal(parts, whole.rows(name, 0, 90))
    state = torch.get_rng_state()
    whole.rows("weight", 0, 90)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_remapped_table_can_be_remapped() -> None:
    weight, optimizer = trained("sgd")
    once = remap_classes(centres_of(weight, optimizer), [4, -1, 0, 36])
    twice = remap_classes(once, [3, 1, -1])
    rows = twice.rows("weight", 0, 3)
    assert torch.equal(rows[0], truth("weight", C)[36])
    assert torch.equal(rows[1], once.rows("weight", 1, 2)[0])
    assert not twice.rows("optimizer.momentum_buffer", 1, 3).any()


def test_a_mapping_from_names() -> None:
    mapping = class_mapping(["ann", "bob", "cyd"], ["cyd", "dan", "ann"])
    assert mapping.tolist() == [2, -1, 0]
    assert mapping.dtype == torch.int64
    with pytest.raises(ValueError, match="new: expected each class once, got 'ann' twice"):
        class_mapping(["ann"], ["ann", "bob", "ann"])


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ([37], ValueError, "expected −1 or a class below 37, got 37"),
        ([-2, 3], ValueError, "expected −1 or a class below 37, got -2"),
        ([1, 2, 1], ValueError, "expected each class at most once, got 1 twice"),
        ([], ValueError, r"expected shape \(C_new,\), got \(0,\)"),
        ([[1]], ValueError, r"expected shape \(C_new,\), got \(1, 1\)"),
        ([1.0], TypeError, "expected an integer dtype, got torch.float32"),
        ([True], TypeError, "expected an integer dtype, got torch.bool"),
    ],
    ids=str,
)
def test_a_wrong_mapping_is_refused(mapping: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"old_class: {message}"):
        remap_classes(centres_of(trained("sgd")[0]), mapping)


def test_a_seed_is_an_integer() -> None:
    with pytest.raises(TypeError, match="seed: expected an int, got str 'x'"):
        remap_classes(centres_of(trained("sgd")[0]), [0, -1], seed="x")  # type: ignore[arg-type]


def test_the_fresh_state_of_other_optimizers_is_asked_for() -> None:
    weight = nn.Parameter(torch.ones(C, D))
    optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.5)
    table = centres_of(weight, optimizer)
    with pytest.raises(ValueError, match=r"fresh_state: expected a value for 'sum', got \{\}"):
        remap_classes(table, [0, -1])
    rows = remap_classes(table, [0, -1], fresh_state={"sum": 0.5}).rows("optimizer.sum", 0, 2)
    assert torch.equal(rows, torch.full((2, D), 0.5))


def test_the_known_fresh_states_are_what_torch_begins_with() -> None:
    """A step with a gradient of zeros shows what state there was before it."""
    optim = torch.optim
    made = {
        optim.SGD: {"momentum": 0.9},
        optim.AdamW: {"amsgrad": True},
        optim.Adamax: {},
        optim.RMSprop: {"momentum": 0.9, "centered": True},
        optim.Adadelta: {},
    }
    seen = set()
    for kind, options in made.items():
        weight = nn.Parameter(torch.ones(2, D))
        optimizer = kind([weight], lr=0.1, **options)
        weight.grad = torch.zeros(2, D)
        optimizer.step()
        for name, value in optimizer.state[weight].items():
            if value.dim():
                seen.add(name)
                # Adamax keeps its norm above eps.
                assert torch.allclose(value, torch.full_like(value, remap.FRESH_STATE[name]), atol=ADAMAX_EPS)
    assert seen == set(remap.FRESH_STATE)
