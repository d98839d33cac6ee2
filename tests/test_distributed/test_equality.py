"""A step of many ranks is that of one process with all rows and centres: loss, gradients, figures.

W ranks · B rows of a rank · N rows of all, by rank · C classes · D features
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import RankFailed, run_ranks
from tests.test_distributed.steps import Case, own_slice, sharded_steps, whole_step
from tests.tolerances import SHARDED, SHARDED_16_BIT, relative_error

MEAN, SUM, NONE = ({"reduction": reduction} for reduction in ("mean", "sum", "none"))
EXACT = {"target_gradient": "exact"}
F32 = torch.float32

CASES = [
    Case("one rank", (7,)),
    Case("one rank, sampled", (4,), classes=60, head={"sample_rate": 0.3}),
    Case("mean", (4, 4), head=MEAN),
    Case("sum", (4, 4), head=SUM),
    Case("none", (4, 4), head=NONE),
    Case("none, uneven", (5, 0, 2), head=NONE, ignored=(1, 6)),
    Case("exact", (4, 4), head=EXACT),
    Case("float32", (4, 4), dtype=F32),
    Case("float32, uneven", (1, 6, 3), classes=1003, dtype=F32),
    Case("ignored rows on one rank", (4, 4, 2), ignored=(4, 6)),
    Case("a rank with ignored rows only", (3, 2, 2), ignored=(3, 4), head=SUM),
    Case("all rows ignored", (2, 1), ignored=(0, 1, 2)),
    # IF 2015 and 1105: the last batch is smaller, or one rank has none left.
    Case("a rank without rows", (3, 0, 5)),
    Case("the first rank without rows", (0, 2)),
    Case("no rows at all", (0, 0)),
    Case("more rows than classes", (9, 9), classes=5),
    Case("one class", (2, 2), classes=1),
    Case("an empty shard", (2, 3, 1, 2), classes=5),
    Case("an empty shard, s = 128", (2, 3, 1, 2), classes=5, head={"scale": 128.0}),
    Case("an empty shard, sampled", (1, 1, 0, 0), classes=9, head={"sample_rate": 0.3}),
    # CVLface rounds the class count up to the number of ranks, and so has negatives that do not exist.
    Case("ten classes", (2, 3, 1, 2), classes=10),
    Case("s = 128", (4, 2), head={"scale": 128.0, **EXACT}, ignored=(1,)),
    Case("s = 128, many classes", (4, 0, 2), classes=1001, head={"scale": 128.0}),
    Case("equal rows", (3, 3, 3), head={"equal_rows": True}, ignored=(1, 3, 4, 5)),
    # IF 2258: two halves of a batch, their losses halved, are the batch.
    Case("two backwards", (4, 4), micro_batches=2),
    Case("four backwards, exact", (4, 8, 4), micro_batches=4, head={"reduction": "mean", **EXACT}),
    # IF 1403 and 1483, TFace 34: why times the number of ranks? For those who average; others say so.
    Case("gradients summed", (4, 1), ddp=False, head={"embedding_grad_scale": 1.0}),
    Case("gradients summed, sum", (4, 0, 3), ddp=False, head={"embedding_grad_scale": 1.0, **SUM}),
    Case("gradients times three", (4, 0, 3), ddp=False, head={"embedding_grad_scale": 3.0}, margin="rows"),
    # IF 2016, AdaFace 13, MagFace 20: margins from the rows' norms break when centres are sharded.
    Case("margins by row", (3, 4), margin="rows"),
    Case("margins by row, exact", (3, 4, 0), margin="rows", head=EXACT),
    Case("margins by row, ignored", (3, 4, 2), margin="rows", head={**EXACT, **SUM}, ignored=(1, 5)),
    Case("margins by row, none", (3, 4, 2), margin="rows", head=NONE),
    Case("margins by row, s = 128", (3, 4), margin="rows", head={"scale": 128.0}),
    Case("margins by row, two backwards", (4, 4), margin="rows", micro_batches=2),
    Case("margin that trains", (3, 4), margin="trained"),
    Case("margin that trains, none", (3, 4, 0), margin="trained", head={**EXACT, **NONE}, ignored=(2,)),
    Case("sampled", (4, 3), classes=101, head={"sample_rate": 0.2}),
    Case("sampled, by row", (4, 0, 3), classes=101, head={"sample_rate": 0.3, **EXACT}, margin="rows"),
    Case("sampled, fewer than rows", (9, 8), classes=20, head={"sample_rate": 0.1}),
    Case("sampled, ignored", (4, 3), classes=101, head={"sample_rate": 0.2}, ignored=(0, 5)),
    Case("autocast", (4, 4), dtype=F32, autocast=True),
    Case("autocast, uneven", (3, 0, 5), dtype=F32, autocast=True, head=SUM),
    Case("frozen backbone", (4, 3), frozen="backbone"),
    Case("frozen centres", (4, 3), frozen="centres"),
]  # fmt: skip


ByRank = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def on_ranks() -> Callable[[int], ByRank]:
    """By number of ranks: what each finds in all cases of so many, which run in one go, once."""
    known: dict[int, ByRank | RankFailed] = {}

    def run(world: int) -> ByRank:
        if world not in known:
            try:
                known[world] = run_ranks(world, sharded_steps, [c for c in CASES if c.world == world])
            except RankFailed as failure:
                known[world] = failure
        found = known[world]
        if isinstance(found, RankFailed):
            raise found
        return found

    return run


def assert_equal(case: Case, what: str, found: Tensor | None, right: Tensor | None) -> None:
    if right is None or found is None:
        assert found is None, f"{what}: expected no gradient"
        assert right is None, f"{what}: expected a gradient, got none"
        return
    assert found.dtype == right.dtype, what
    allowed = SHARDED_16_BIT if case.autocast else SHARDED[case.dtype]
    finite = ~right.isnan()
    assert torch.equal(finite, ~found.isnan()), what
    known = right[finite], found[finite]
    infinite = known[0].isinf()
    assert torch.equal(known[0][infinite], known[1][infinite]), what
    error = relative_error(known[1][~infinite], known[0][~infinite])
    assert error <= allowed, f"{what}: error {error:.3g}, at most {allowed:.3g} allowed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_equals_one_process_on_the_whole_batch(case: Case, on_ranks: Callable[[int], ByRank]) -> None:
    results, right = [found[case.name] for found in on_ranks(case.world)], whole_step(case)
    factor = case.head.get("embedding_grad_scale", 1.0)
    assert torch.equal(torch.cat([found["local"] for found in results]), right["local"])
    for rank, found in enumerate(results):
        own = own_slice(case.rows, rank)
        loss = right["loss"][own] if case.head.get("reduction") == "none" else right["loss"]
        assert_equal(case, "loss", found["loss"], loss)
        if case.margin == "rows":
            # Each rank's own rows; what DDP averages, or the caller sums, is of the same scale.
            scale = factor if not case.ddp else case.world
            assert_equal(case, "margin", found["leaf"], right["leaf"][own] * scale)
        assert_equal(case, "margin's parameter", found["trained"], right["trained"])
        for i, figure in enumerate(found["stats"]):
            assert_equal(case, f"statistic {i}", figure.double(), right["stats"][i][own].double())
        assert_equal(case, "top cosines", found["cos"], right["cos"][own])
        assert torch.equal(found["classes"], right["classes"][own])
        assert found["sampling_step"] == (case.micro_batches if "sample_rate" in case.head else 0)
    for i, gradient in enumerate(right["backbone"]):
        name = f"backbone {i}"
        if case.ddp:
            for found in results:
                assert_equal(case, name, found["backbone"][i], gradient)
        else:
            assert_equal(case, name, sum(found["backbone"][i] for found in results), gradient * factor)
    if right["dw"] is None:
        assert all(found["dw"] is None for found in results)
    else:
        assert_equal(case, "dw", torch.cat([found["dw"] for found in results]), right["dw"])
