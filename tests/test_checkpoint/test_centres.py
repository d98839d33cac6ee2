"""One file of centres: what is in it, what is refused, and that a failure costs nothing."""

from __future__ import annotations

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
from tests.test_checkpoint.trained import OPTIMIZERS, D, Head, assert_is_truth, fill_with_truth, truth

C = 37


def saved(folder: Path, kind: str = "adamw", num_classes: int = C) -> Path:
    head = Head(num_classes)
    optimizer = OPTIMIZERS[kind](head.parameters())
    fill_with_truth(head.weight, optimizer, 0, num_classes)
    path = folder / "centres.safetensors"
    save_centres(path, head.weight, optimizer)
    return path


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("chunk_bytes", [1, 5 * D * 4, 2**24], ids=["row", "five rows", "all"])
def test_centres_and_state_come_back_bit_by_bit(
    kind: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "CHUNK_BYTES", chunk_bytes)
    path = saved(tmp_path, kind)
    head = Head(C)
    optimizer = OPTIMIZERS[kind](head.parameters())
    weight, storage = head.weight, head.weight.data_ptr()
    load_centres(path, head.weight, optimizer)
    assert_is_truth(head.weight, optimizer, kind, 0, C)
    assert head.weight is weight
    assert head.weight.data_ptr() == storage
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_the_plain_library_reads_the_file_and_its_metadata(tmp_path: Path) -> None:
    head = Head(C)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    fill_with_truth(head.weight, optimizer, 0, C)
    path = tmp_path / "centres.safetensors"
    save_centres(path, head.weight, optimizer, metadata={"epoch": "3"})
    tensors = load_file(path)
    assert set(tensors) == {"weight", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"}
    assert torch.equal(tensors["weight"], truth("weight", C))
    assert torch.equal(tensors["optimizer.exp_avg"], truth("exp_avg", C))
    assert tensors["optimizer.step"].item() == 7.0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"epoch": "3", "format": "pt", "optimizer": "AdamW"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_of_centres_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    head = Head(C, dtype=dtype)
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    fill_with_truth(head.weight, optimizer, 0, C)
    save_centres(tmp_path / "file", head.weight, optimizer)
    other = Head(C, dtype=dtype)
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    load_centres(tmp_path / "file", other.weight, optimizer)
    assert_is_truth(other.weight, optimizer, "adamw", 0, C)


def test_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    def step(head: MarginSoftmaxHead, optimizer: torch.optim.Optimizer) -> None:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        head(x, torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = MarginSoftmaxHead(16, 20, seed=1)
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.01)
    step(first, optimizer)
    save_centres(tmp_path / "file", first.weight, optimizer)
    step(first, optimizer)
    second = MarginSoftmaxHead(16, 20, seed=2)
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.01)
    load_centres(tmp_path / "file", second.weight, optimizer)
    step(second, optimizer)
    assert torch.equal(first.weight, second.weight)


def test_centres_alone(tmp_path: Path) -> None:
    path = saved(tmp_path)
    head = Head(C)
    load_centres(path, head.weight)  # the file's state is left where it is
    assert torch.equal(head.weight, truth("weight", C))
    save_centres(path, head.weight)
    assert set(load_file(path)) == {"weight"}
    optimizer = OPTIMIZERS["sgd"](head.parameters())
    with pytest.raises(ValueError, match=r"expected the state of SGD, got none of it; pass optimizer=None"):
        load_centres(path, head.weight, optimizer)


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


WRONG = {
    "classes": (lambda: Head(C + 1).weight, "expected 38 classes as in weight, got 37; remap_classes"),
    "features": (lambda: nn.Parameter(torch.zeros(C, 4)), "expected D = 4 as in weight, got 6"),
    "dtype": (
        lambda: Head(C, dtype=torch.float64).weight,
        "expected torch.float64 as in weight, got torch.fl",
    ),
    "shape": (lambda: nn.Parameter(torch.zeros(C)), r"expected shape \(C, D\), got \(37,\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_weight_that_does_not_fit_is_left_alone(wrong: str, tmp_path: Path) -> None:
    make, message = WRONG[wrong]
    path, weight = saved(tmp_path), make()
    optimizer = OPTIMIZERS["adamw"]([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        load_centres(path, weight, optimizer)
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"].item() == 1


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "sgd")
    head = Head(C)
    with pytest.raises(ValueError, match=r"\['exp_avg', 'exp_avg_sq', 'step'\] of AdamW, got \['momentum_"):
        load_centres(path, head.weight, OPTIMIZERS["adamw"](head.parameters()))
    with pytest.raises(ValueError, match=r"expected the state \['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'"):
        load_centres(saved(tmp_path), head.weight, torch.optim.Adam(head.parameters(), amsgrad=True))
    # The other way, and where nothing is known of the state yet but that it is another's.
    with pytest.raises(
        ValueError, match=r"\['momentum_buffer'\] of SGD, got .* of AdamW; pass optimizer=None"
    ):
        load_centres(saved(tmp_path), head.weight, OPTIMIZERS["sgd"](head.parameters()))
    with pytest.raises(
        ValueError, match=r"expected the state of RMSprop, got \['exp_avg', .*\] of AdamW; pass"
    ):
        load_centres(path, head.weight, torch.optim.RMSprop(head.parameters()))
    with pytest.raises(ValueError, match="expected one that trains weight, got a SGD without it"):
        load_centres(path, head.weight, OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(1))]))
    assert not head.weight.any()


def test_state_that_is_not_by_class_is_refused(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(C, D))
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.ones(C, D)
    optimizer.step()
    with pytest.raises(ValueError, match=r"its state 'col_var' of shape \(1, 6\) has not one row for each"):
        save_centres(tmp_path / "file", weight, optimizer)
    assert not list(tmp_path.iterdir())


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
def test_a_failure_in_the_middle_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    done = getattr(Layout, step)

    def fail(self: Layout, *args: object, **kwargs: object) -> None:
        done(self, *args, **kwargs)
        assert list(tmp_path.glob(".*.tmp"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Layout, step, fail)
    with pytest.raises(OSError, match="No space left on device"):
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


def test_the_header_is_aligned_and_as_long_as_it_says(tmp_path: Path) -> None:
    content = saved(tmp_path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    ends = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert 8 + length + ends[-1][1] == len(content)


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
    heard = Share.from_json(json.loads(json.dumps(part.to_json())))
    assert heard._replace(values={}) == part._replace(values={})
    assert list(heard.values) == list(values)
    for name, value in values.items():
        assert heard.values[name].dtype == value.dtype
        assert torch.equal(heard.values[name], value)


def test_state_of_a_dtype_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(C, D))
    optimizer = OPTIMIZERS["sgd"]([weight])
    optimizer.state[weight]["momentum_buffer"] = torch.ones(C, D, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"optimizer.momentum_buffer: expected .*, got torch.complex64"):
        save_centres(tmp_path / "file", weight, optimizer)


def test_metadata_is_strings(tmp_path: Path) -> None:
    """The library opens no file with others."""
    odd: Any = {"epoch": 3}
    with pytest.raises(TypeError, match=r"metadata: expected strings by name, got {'epoch': 3}"):
        save_centres(tmp_path / "file", Head(C).weight, metadata=odd)
    for none, told in (("3", "str '3'"), ("", "str ''"), (["epoch", "3"], r"list \['epoch', '3'\]")):
        given: Any = none
        message = f"metadata: expected strings by name, such as {{'epoch': '3'}}, got {told}"
        with pytest.raises(TypeError, match=message):
            save_centres(tmp_path / "file", Head(C).weight, metadata=given)
    assert not list(tmp_path.iterdir())


def test_a_head_in_place_of_its_weight_and_a_place_that_is_none_are_named(tmp_path: Path) -> None:
    head: Any = MarginSoftmaxHead(D, C)
    path = tmp_path / "centres.safetensors"
    with pytest.raises(
        TypeError, match=r"weight: expected a tensor, such as head.weight, got MarginSoftmaxHead"
    ):
        save_centres(path, head)
    save_centres(path, head.weight)
    with pytest.raises(
        TypeError, match=r"weight: expected a tensor, such as head.weight, got MarginSoftmaxHead"
    ):
        load_centres(path, head)
    with pytest.raises(FileNotFoundError, match=r"path: there is no directory .*nowhere$"):
        save_centres(tmp_path / "nowhere" / "centres.safetensors", head.weight)
    with pytest.raises(IsADirectoryError, match=r"path: expected a file, .* is a directory"):
        save_centres(tmp_path, head.weight)
    assert list(tmp_path.iterdir()) == [path]
