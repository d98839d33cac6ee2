"""Ranks that agree, fail together and add up: what the package asks of a process group."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from expface_kernels.distributed.group import Group
from tests.distributed import run_ranks

ODD = 1


def failing(group: Group, error: Exception) -> str:
    """What this rank gets where the odd one raises inside `all_or_none`."""
    try:
        with group.all_or_none("this file"):
            if group.rank == ODD:
                raise error
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def asked(process_group: Any) -> dict[str, Any]:
    group = Group(process_group)
    values = torch.tensor([1.0, group.rank])
    found = {
        "who": (group.rank, group.size),
        "told": group.gather_json({"rank": group.rank, "text": "é" * group.rank}),
        "sum": group.sum(values),
        "largest": group.largest(values),
        "values": values,
        "refused": failing(group, ValueError("no such class")),
        "named": failing(group, FileNotFoundError(2, "gone")),
    }
    with group.all_or_none("this file"):
        found["after"] = "ok"
    return found


def test_ranks_tell_each_other_values_and_fail_together() -> None:
    for rank, found in enumerate(run_ranks(3, asked)):
        assert found["who"] == (rank, 3)
        assert found["told"] == [{"rank": r, "text": "é" * r} for r in range(3)]
        assert found["sum"].tolist() == [3.0, 3.0]
        assert found["largest"].tolist() == [1.0, 2.0]
        assert found["values"].tolist() == [1.0, rank]
        own = rank == ODD
        others = "RuntimeError: rank 1 of process_group refused this file: "
        assert found["refused"] == ("ValueError: " if own else others) + "no such class"
        assert found["named"] == ("" if own else others) + "FileNotFoundError: [Errno 2] gone"
        assert found["after"] == "ok"


def test_one_process_is_a_group_that_sends_nothing() -> None:
    group, values = Group(), torch.ones(2)
    assert (group.rank, group.size) == (0, 1)
    assert group.gather_json({"a": [1, None]}) == [{"a": [1, None]}]
    assert group.sum(values) is values
    group.agree({"scale": "64"})
    with pytest.raises(KeyError), group.all_or_none("this file"):
        raise KeyError("as it is")


def test_a_group_is_not_copied_and_says_what_to_save_instead() -> None:
    group = Group()
    assert copy.deepcopy({"group": group})["group"] is group
    with pytest.raises(TypeError, match=r"state_dict\(\).*save_centres"):
        pickle.dumps(group)
    with pytest.raises(TypeError, match="process_group: expected a torch"):
        Group("world")
