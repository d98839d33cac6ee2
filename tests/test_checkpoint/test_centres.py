"""One file of centres: what is in it, what is refused, and that a failure costs nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from expface_kernels import MarginSoftmaxHead
from expface_kernels.checkpoint import centres_of, load_centres, open_centres, save_centres, table
from expface_kernels.checkpoint.files import Layout
from expface_kernels.checkpoint.table import RowSpec, Share
from tests.test_checkpoint.trained import (
    OPTIMIZERS,
    D,
    Head,
    assert_is_truth,
    assert_same,
    failing,
    fill_with_truth,
    truth,
)

C = 37


def saved(folder: Path, kind: str = "adamw", dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    head = Head(C, dtype=dtype)
    optimizer = OPTIMIZERS[kind](head.parameters())
    fill_with_truth(head.weight, optimizer, 0, C)
    path = folder / "centres.safetensors"
    save_centres(path, head.weight, optimizer, metadata=metadata)
    return path


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("chunk_bytes", [1, 5 * D * 4, 2**24], ids=["row", "five rows", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_centres_and_state_come_back_bit_by_bit(
    kind: str, chunk_bytes: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "CHUNK_BYTES", chunk_bytes)
    path = saved(tmp_path, kind, dtype)
    head = Head(C, dtype=dtype)
    optimizer = OPTIMIZERS[kind](head.parameters())
    weight, storage = head.weight, head.weight.data_ptr()
    load_centres(path, head.weight, optimizer)
    assert_is_truth(head.weight, optimizer, kind, 0, C)
    assert head.weight is weight
    assert head.weight.data_ptr() == storage
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_the_plain_library_reads_the_file_and_its_metadata(tmp_path: Path) -> None:
    path = saved(tmp_path, epoch="3")
    tensors = load_file(path)
    assert set(tensors) == {"weight", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"}
    assert torch.equal(tensors["weight"], truth("weight", C))
    assert torch.equal(tensors["optimizer.exp_avg"], truth("exp_avg", C))
    assert tensors["optimizer.step"].item() == 7.0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"epoch": "3", "format": "pt", "optimizer": "AdamW"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # or mapped rows would not be aligned


def test_centres_alone(tmp_path: Path) -> None:
    path = saved(tmp_path)
    head = Head(C)
    load_centres(path, head.weight)  # the file's state is left where it is
    assert torch.equal(head.weight, truth("weight", C))
    save_centres(path, head.weight)
    assert set(load_file(path)) == {"weight"}


def test_a_file_saved_before_the_first_step_resets_the_state(tmp_path: Path) -> None:
    head = Head(C)
    save_centres(tmp_path / "file", head.weight, OPTIMIZERS["adamw"](head.parameters()))
    other = Head(C)
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    fill_with_truth(other.weight, optimizer, 0, C)
    load_centres(tmp_path / "file", other.weight, optimizer)
    assert optimizer.state[other.weight] == {}
    assert torch.equal(other.weight, torch.zeros(C, D))


def test_other_files_with_a_matrix_are_read_by_its_name(tmp_path: Path) -> None:
    save_file({"fc.weight": truth("weight", C), "bias": torch.zeros(3)}, tmp_path / "file")
    head = Head(C)
    with open_centres(tmp_path / "file", name="fc.weight") as table:
        load_centres(table, head.weight)
    assert torch.equal(head.weight, truth("weight", C))
    with pytest.raises(ValueError, match=r"expected a tensor 'weight' in it, got \['bias', 'fc.weight'\]"):
        open_centres(tmp_path / "file")


def test_rows_are_taken_from_the_mapped_file_not_from_a_copy_of_it(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with open_centres(path) as table:
        assert torch.equal(table.take("weight", torch.tensor([5, 30, 2])), truth("weight", C)[[5, 30, 2]])
        assert torch.equal(table.rows("weight", 5, 8), truth("weight", C)[5:8])
    with safe_open(path, framework="pt") as file:
        first, second = file.get_tensor("weight"), file.get_tensor("weight")
        assert first.data_ptr() == second.data_ptr()  # what `take` counts on


def adafactor(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def with_complex_state(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS["sgd"]([weight])
    optimizer.state[weight]["momentum_buffer"] = torch.ones(C, D, dtype=torch.complex64)
    return optimizer


def adam(weight: nn.Parameter) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"]([weight])


def sgd(weight: nn.Parameter) -> torch.optim.Optimizer:
    return OPTIMIZERS["sgd"]([weight])


def of_another(weight: nn.Parameter) -> torch.optim.Optimizer:
    return OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("weight", "make", "kind", "message"),
    [
        (torch.zeros(C + 1, D), adam, "adamw", "expected 38 classes as in weight, got 37; remap_classes"),
        (torch.zeros(C, 4), adam, "adamw", "expected D = 4 as in weight, got 6"),
        (torch.zeros(C, D).double(), adam, "adamw", "expected torch.float64 as in weight, got torch.float32"),
        (torch.zeros(C), adam, "adamw", r"expected shape \(C, D\), got \(37,\)"),
        (None, adam, "sgd", r"\['exp_avg', 'exp_avg_sq', 'step'\] of AdamW, got \['momentum_"),
        (None, sgd, "adamw", r"\['momentum_buffer'\] of SGD, got .* of AdamW; pass optimizer=None"),
        (None, sgd, None, r"expected the state of SGD, got none of it; pass optimizer=None"),
        (None, of_another, "sgd", "expected one that trains weight, got a SGD without it"),
        (
            None,
            lambda weight: torch.optim.Adam([weight], amsgrad=True),
            "adamw",
            r"expected the state \['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'",
        ),
        # Nothing is known of the state yet but that it is another's.
        (
            None,
            lambda weight: torch.optim.RMSprop([weight]),
            "adamw",
            r"expected the state of RMSprop, got \['exp_avg', .*\] of AdamW; pass",
        ),
    ],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_weight_or_an_optimizer_that_does_not_fit_is_left_alone(
    weight: torch.Tensor | None, make: Any, kind: str | None, message: str, stepped: bool, tmp_path: Path
) -> None:
    path = saved(tmp_path, kind or "adamw")
    if kind is None:
        save_centres(path, Head(C).weight)
    parameter = nn.Parameter(torch.zeros(C, D) if weight is None else weight.clone())
    optimizer = make(parameter)
    if stepped:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        message = message.replace("state of RMSprop", r"state \['square_avg', 'step'\] of RMSprop")
    before = copy.deepcopy((parameter.detach(), optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=message):
        load_centres(path, parameter, optimizer)
    assert_same((parameter.detach(), optimizer.state_dict()["state"]), before)


@pytest.mark.parametrize("kept", [0, 4, 50, 0.5, -1], ids=str)
def test_a_truncated_file_is_an_error_and_nothing_is_lost(kept: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    head = Head(C)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    fill_with_truth(head.weight, optimizer, 0, C)
    with pytest.raises(ValueError, match=r"expected a whole safetensors file, got one truncated or damaged"):
        load_centres(path, head.weight, optimizer)
    assert_is_truth(head.weight, optimizer, "adamw", 0, C)


def test_a_missing_file_and_a_state_with_other_rows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load_centres(tmp_path / "nowhere", Head(C).weight)
    save_file({"weight": torch.zeros(C, D), "optimizer.exp_avg": torch.zeros(C - 1, D)}, tmp_path / "odd")
    with pytest.raises(
        ValueError, match=r"'optimizer.exp_avg': expected 37 rows, one a class, got \(36, 6\)"
    ):
        load_centres(tmp_path / "odd", Head(C).weight)


@pytest.mark.parametrize("step", ["create", "write"])
def test_a_failure_in_the_middle_leaves_the_old_file(step: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    with failing(Layout, step), pytest.raises(OSError, match="No space left on device"):
        save_centres(path, Head(C).weight)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_brings_its_own_state(tmp_path: Path) -> None:
    path = saved(tmp_path)
    head = Head(C)
    with open_centres(path) as table:
        save_centres(tmp_path / "copy", table)
        with pytest.raises(ValueError, match="optimizer: expected None, since a table brings its own state"):
            save_centres(tmp_path / "copy", table, OPTIMIZERS["adamw"](head.parameters()))
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_a_live_table_shares_memory_with_the_weight() -> None:
    head = Head(C)
    table = centres_of(head.weight, OPTIMIZERS["sgd"](head.parameters()))
    assert table.rows("weight", 0, C).data_ptr() == head.weight.data_ptr()
    assert (table.num_classes, table.held, table.optimizer) == (C, (0, C), "SGD")


def test_what_a_rank_says_of_its_share_arrives_as_it_was() -> None:
    """As JSON, to the last digit."""
    values = {
        "step": torch.tensor(7.0),
        "rate": torch.tensor(0.1),
        "product": torch.tensor(0.1 + 0.2, dtype=torch.float64),
        "half": torch.tensor(0.1, dtype=torch.bfloat16),
        "never": torch.tensor(float("inf")),
        "count": torch.tensor(2**62 + 1),
        "on": torch.tensor(True),
    }
    tensors = {"weight": RowSpec(torch.float16, (6,)), "flag": RowSpec(torch.uint8, ())}
    part = Share(3, None, tensors, values, "AdamW")
    received = Share.from_json(json.loads(json.dumps(part.to_json())))
    assert received._replace(values={}) == part._replace(values={})
    assert list(received.values) == list(values)
    for name, value in values.items():
        assert received.values[name].dtype == value.dtype
        assert torch.equal(received.values[name], value)


HEAD: Any = MarginSoftmaxHead(D, C)
NO_TENSOR = "weight: expected a tensor, such as head.weight, got MarginSoftmaxHead"
STRINGS = "metadata: expected strings by name, such as {'epoch': '3'}, got"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": HEAD}, TypeError, NO_TENSOR),
        ({"path": "nowhere/file"}, FileNotFoundError, r"path: there is no directory .*nowhere$"),
        ({"path": ""}, IsADirectoryError, r"path: expected a file, .* is a directory"),
        ({"optimizer": adafactor}, ValueError, r"'col_var' of shape \(1, 6\) has not one row for each"),
        ({"optimizer": with_complex_state}, TypeError, r"optimizer.momentum_buffer: .*, got torch.complex64"),
        # The library opens no file with other metadata than strings.
        ({"metadata": {"epoch": 3}}, TypeError, r"metadata: expected strings by name, got {'epoch': 3}"),
        ({"metadata": "3"}, TypeError, f"{STRINGS} str '3'"),
        ({"metadata": ""}, TypeError, f"{STRINGS} str ''"),
        ({"metadata": ["epoch", "3"]}, TypeError, rf"{STRINGS} list \['epoch', '3'\]"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_no_file(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    weight = change.get("weight", nn.Parameter(torch.ones(C, D)))
    make = change.get("optimizer")
    with pytest.raises(error, match=message):
        save_centres(
            tmp_path / change.get("path", "file"),
            weight,
            make(weight) if make else None,
            metadata=change.get("metadata"),
        )
    assert not list(tmp_path.iterdir())


def test_a_head_in_place_of_its_weight_is_not_loaded_either(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=NO_TENSOR):
        load_centres(saved(tmp_path), HEAD)
