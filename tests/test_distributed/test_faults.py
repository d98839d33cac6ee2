"""What users of many ranks get wrong, and ranks that die: every rank gets an error, none waits for ever.

B rows of a rank · C classes · D features
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead
from tests.distributed import DEADLINE, bare_processes, run_ranks

C, D = 10, 8
ODD_ONE = 1  # the rank that does it another way, of 3
TIMEOUT = 6.0  # seconds, of the group whose rank dies
# What torch.distributed says of a rank that is gone or late; anything else is a mistake of ours.
OF_THE_GROUP = re.compile(r"(RuntimeError|Dist\w*Error): .*(gloo|[Cc]onnection|imed out|timeout)", re.DOTALL)


def no_margin(theta: Tensor) -> Tensor:
    return torch.cos(theta)


def some_margin(theta: Tensor) -> Tensor:
    return torch.cos(theta) - 0.1


class Unshown:
    """An attribute that cannot be put into words."""

    def __str__(self) -> str:
        raise KeyError("no words")


class Unspeakable(ExpFace):
    def __init__(self) -> None:
        super().__init__()
        self.more = Unshown()


class Moody:
    """A margin that knows its rows, and does not like those of one rank."""

    per_row = True

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def __call__(self, theta: Tensor) -> Tensor:
        if self.raises:
            raise KeyError("not these rows")
        return torch.cos(theta) - 0.1


class TrainedByRow(nn.Module):
    per_row = True

    def __init__(self) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(0.1))

    def forward(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - self.steepness


# name → (what the others build with, what rank 1 does, how the two are shown)
BUILT_OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "num_classes": ({}, {"num_classes": 11}, "10", "11"),
    "embedding_size": ({}, {"embedding_size": 9}, "8", "9"),
    "margin": ({"margin": ExpFace(0.7)}, {"margin": ExpFace(0.5)}, "ExpFace(m=0.7)", "ExpFace(m=0.5)"),
    "margin, kind": (
        {"margin": ArcFace(0.5)},
        {"margin": ArcFace(0.5, "easy")},
        "ArcFace(m=0.5, boundary=none)",
        "ArcFace(m=0.5, boundary=easy)",
    ),
    "margin, yours": ({"margin": no_margin}, {"margin": some_margin}, "no_margin", "some_margin"),
    "scale": ({"scale": 64.0}, {"scale": 32.0}, "64.0", "32.0"),
    "sample_rate": ({}, {"sample_rate": 0.1}, "1.0", "0.1"),
    "reduction": ({}, {"reduction": "sum"}, "mean", "sum"),
    "target_gradient": ({}, {"target_gradient": "exact"}, "detached", "exact"),
    "ignore_index": ({}, {"ignore_index": -1}, "-100", "-1"),
    "embedding_grad_scale": ({}, {"embedding_grad_scale": 1.0}, "None", "1.0"),
    "equal_rows": ({}, {"equal_rows": True}, "False", "True"),
    "seed": ({}, {"seed": 7}, "0", "7"),
    "dtype": ({}, {"dtype": torch.float64}, "torch.float32", "torch.float64"),
}


def message(call: Any) -> str:
    """What it raises, as "Type: text"; "" for nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def built(group: Any, **options: Any) -> MarginSoftmaxHead:
    return MarginSoftmaxHead(**{"embedding_size": D, "num_classes": C, "process_group": group, **options})


def building(group: Any) -> dict[str, str]:
    """What this rank is told of each disagreement, and of arguments that rank 1 alone gets wrong."""
    odd = group.rank() == ODD_ONE
    told = {
        name: message(lambda options=theirs if odd else ours: built(group, **options))
        for name, (ours, theirs, *_) in BUILT_OTHERWISE.items()
    }
    several = {"num_classes": C + group.rank(), "scale": 32.0 if odd else 64.0}
    told["several"] = message(lambda: built(group, **several))
    told["refused"] = message(lambda: built(group, scale=-1.0 if odd else 64.0))
    told["describing"] = message(lambda: built(group, margin=Unspeakable() if odd else ExpFace()))
    told["sparse"] = message(lambda: built(group, sparse_grad=True))
    told["no member"] = message(lambda: built(dist.GroupMember.NON_GROUP_MEMBER))
    told["right after all"] = message(lambda: built(group))
    return told


def test_ranks_that_build_another_head_are_named_with_what_they_said() -> None:
    for rank, told in enumerate(run_ranks(3, building)):
        for name, (_, _, usual, other) in BUILT_OTHERWISE.items():
            expected = (
                f"ValueError: {name.split(',')[0]}: expected the same on every rank of process_group, "
                f"got {usual} on ranks 0, 2, {other} on rank 1"
            )
            assert told[name] == expected, rank
        assert "num_classes: expected the same" in told["several"]
        assert "got 10 on rank 0, 11 on rank 1, 12 on rank 2; scale: expected" in told["several"]
        own = "scale: expected a finite number above 0, got -1.0"
        others = f"rank 1 of process_group refused the head: {own}"
        assert told["refused"] == "ValueError: " + (own if rank == ODD_ONE else others)
        assert told["describing"] == (
            "KeyError: 'no words'"
            if rank == ODD_ONE
            else "ValueError: rank 1 of process_group refused the head: KeyError: 'no words'"
        )
        assert told["sparse"].startswith("ValueError: sparse_grad: expected False with process_group")
        assert told["no member"].startswith("TypeError: process_group: expected")
        assert told["right after all"] == ""


Call = Callable[[MarginSoftmaxHead, Tensor, Tensor], Any]


def step(head: MarginSoftmaxHead, x: Tensor, y: Tensor) -> Any:
    return head(x, y)


@dataclass(frozen=True)
class Fault:
    """What rank 1 does another way, and what the ranks are told."""

    words: str
    """Of rank 1's own error where `kind` is given; else "name: values", in which the ranks differ."""
    odd: Call = step
    usual: Call = step
    attributes: dict[str, Any] = field(default_factory=dict)
    """Of rank 1's head in this step."""
    kind: str = ""
    """Of the error that rank 1 raises, of which the others hear; "" where ranks find out by comparing."""

    def told(self, rank: int) -> str:
        if not self.kind:
            name, values = self.words.split(": ", 1)
            return f"{name}: expected the same on every rank of process_group, got {values} on rank 1"
        if rank == ODD_ONE:
            return f"{self.kind}: {self.words}"
        named = "" if self.kind in ("ValueError", "TypeError", "RuntimeError") else f"{self.kind}: "
        return f"ValueError: rank 1 of process_group refused this call: {named}{self.words}"


def no_grad_step(head: MarginSoftmaxHead, x: Tensor, y: Tensor) -> Any:
    with torch.no_grad():
        return head(x, y)


def changed(name: str, value: Any, words: str) -> Fault:
    return Fault(f"{name}: {words}", attributes={name: value})


def refused(words: str, odd: Call, usual: Call = step, kind: str = "ValueError") -> Fault:
    return Fault(words, odd, usual, kind=kind)


def nearest(k: Any) -> Call:
    return lambda head, x, y: head.topk(x, k)


FLOAT = "torch.float32, requires_grad=True on ranks 0, 2"
NARROW = "embeddings: expected 8 features as in weight (4, 8), got shape (3, 7)"
FAULTS = {
    "margin": changed("margin", CosFace(0.1), "ExpFace(m=0.7) on ranks 0, 2, CosFace(m=0.1)"),
    "scale": changed("scale", 32.0, "64.0 on ranks 0, 2, 32.0"),
    "reduction": changed("reduction", "sum", "mean on ranks 0, 2, sum"),
    "target_gradient": changed("target_gradient", "exact", "detached on ranks 0, 2, exact"),
    "embedding_grad_scale": changed("embedding_grad_scale", 1.0, "3.0 on ranks 0, 2, 1.0"),
    "backend": changed("backend", "reference", "auto on ranks 0, 2, reference"),
    "training": Fault("sample_rate: 0.9 on ranks 0, 2, 1.0", attributes={"training": False}),
    "per-row margin": Fault(
        "per-row margin: False on ranks 0, 2, True", attributes={"margin": ExpFace(torch.full((3,), 0.7))}
    ),
    "rows of the margin": Fault(
        "margin: expected m of shape (3,), one value for each of this rank's rows, got (4,)",
        attributes={"margin": ExpFace(torch.full((4,), 0.7))},
        kind="ValueError",
    ),
    "triton": Fault(
        'backend "triton" cannot serve this call: ', attributes={"backend": "triton"}, kind="RuntimeError"
    ),
    "return_stats": Fault(
        "return_stats: False on ranks 0, 2, True", lambda head, x, y: head(x, y, return_stats=True)
    ),
    "dtype": Fault(
        f"embeddings: {FLOAT}, torch.float64, requires_grad=True",
        lambda head, x, y: head(x.detach().double().requires_grad_(), y),
    ),
    "frozen": Fault(
        f"embeddings: {FLOAT}, torch.float32, requires_grad=False", lambda head, x, y: head(x.detach(), y)
    ),
    "grad mode": Fault("grad_enabled: True on ranks 0, 2, False", no_grad_step),
    "shape": refused(NARROW, lambda head, x, y: head(x[:, :-1], y)),
    "no tensor": refused(
        "embeddings: expected a tensor (B, D), got list",
        lambda head, x, y: head([1.0], y),  # type: ignore[arg-type]
        kind="TypeError",
    ),
    "float labels": refused(
        "labels: expected an integer dtype, got torch.float32",
        lambda head, x, y: head(x, y.float()),
        kind="TypeError",
    ),
    "label out of range": refused(
        "labels: expected 0 <= label < 10 or ignore_index=-100, got 10 in row 2",
        lambda head, x, y: head(x, y + 1),
    ),
    "labels missing": refused(
        "labels: expected shape (3,) or (3, 1), got (2,)", lambda head, x, y: head(x, y[:2])
    ),
    "k": Fault("k: 2 on ranks 0, 2, 3", nearest(3), nearest(2)),
    "k too large": refused(
        "k: expected at most the 10 classes there are, got 11", nearest(C + 1), nearest(C)
    ),
    "k of no kind": refused("k: expected an int, got NoneType None", nearest(None), nearest(C), "TypeError"),
    "topk of wrong rows": refused(NARROW, lambda head, x, y: head.topk(x[:, :-1], C), nearest(C)),
    "topk": Fault("call: loss on ranks 0, 2, topk", nearest(2)),
}


def stepping(group: Any) -> dict[str, str]:
    """Rank 1 does one thing another way, for each of FAULTS; then all go on as if nothing had been."""
    odd = group.rank() == ODD_ONE
    head = built(group, sample_rate=0.9)
    x, y = torch.randn(3, D, requires_grad=True), torch.tensor([0, 5, C - 1])
    told = {}
    for name, fault in FAULTS.items():
        before = {attribute: getattr(head, attribute) for attribute in fault.attributes}
        for attribute, value in fault.attributes.items() if odd else ():
            setattr(head, attribute, value)
        act = fault.odd if odd else fault.usual
        told[name] = message(lambda act=act: act(head, x, y))
        for attribute, value in before.items():
            setattr(head, attribute, value)
    few = built(group, num_classes=2, backend="triton")  # the last rank has no class
    told["no such backend, empty shard"] = message(lambda: few(x, y.clamp_max(1)))
    told["no such backend, topk"] = message(lambda: few.topk(x, 1))
    usual = head.margin
    for gradient in ("detached", "exact"):
        head.target_gradient, head.margin = gradient, Moody(odd)
        told[f"margin that raises, {gradient}"] = message(lambda: head(x, y))
    head.margin = TrainedByRow()
    told["trained by row"] = message(lambda: head(x, y))
    head.margin.requires_grad_(False)
    told["by row, frozen"] = message(lambda: head(x, y).backward())
    head.target_gradient, head.margin = "detached", usual
    told["right after all"] = message(lambda: head(x, y).backward())
    told["sampling_step"] = str(head.sampling_step)
    return told


def test_ranks_that_step_another_way_are_told_and_may_go_on() -> None:
    moody = Fault("'not these rows'", kind="KeyError")
    for rank, told in enumerate(run_ranks(3, stepping)):
        for name, fault in FAULTS.items():
            assert fault.told(rank) in told[name], name
        for call in ("empty shard", "topk"):
            assert told[f"no such backend, {call}"].startswith(
                'RuntimeError: backend "triton" cannot serve this call: '
            )
        for gradient in ("detached", "exact"):
            assert told[f"margin that raises, {gradient}"] == moody.told(rank)
        assert told["trained by row"].startswith(
            "ValueError: margin: expected one without parameters that train, since it has a value a row"
        )
        assert "got TrainedByRow with steepness; compute the values in a module" in told["trained by row"]
        assert told["by row, frozen"] == ""
        assert told["right after all"] == ""
        assert told["sampling_step"] == "2"


class WithBackbone(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Linear(D, D)
        self.head = head


def wrapping(group: Any) -> dict[str, str]:
    """What DistributedDataParallel says to a head, to a model with one, and to one told to leave it alone."""
    head, model = built(group), WithBackbone(built(group))
    told = {
        "head": message(lambda: DistributedDataParallel(head, process_group=group)),
        "model": message(lambda: DistributedDataParallel(model, process_group=group)),
        "listed": str([name for name, _ in model.named_parameters()]),
    }
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, ["head.weight"])
    told["ignored"] = message(lambda: DistributedDataParallel(model, process_group=group))
    one = WithBackbone(MarginSoftmaxHead(D, C))
    told["one process"] = message(lambda: DistributedDataParallel(one, process_group=group))
    return told


def test_a_wrapped_head_says_what_to_wrap_instead() -> None:
    for told in run_ranks(2, wrapping):
        for where, name in (("head", "weight"), ("model", "head.weight")):
            assert told[where].startswith("RuntimeError: DistributedDataParallel: expected a module without")
            assert f"got one with {name}." in told[where]
            assert "wrap the backbone only" in told[where]
        assert told["listed"] == "['backbone.weight', 'backbone.bias', 'head.weight']"
        assert told["ignored"] == ""
        assert told["one process"] == ""


def until_one_dies(rank: int, folder: str, end: Any) -> None:
    """A step with all three ranks, then rank 1 waits to be killed and the others try two more."""
    store = dist.FileStore(f"{folder}/store", 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    x, y = torch.randn(3, D, requires_grad=True), torch.tensor([0, 5, C - 1])
    built(dist.group.WORLD)(x, y).backward()  # all that a first step does once takes its time
    head = built(dist.new_group(timeout=timedelta(seconds=TIMEOUT)))
    head(x, y).backward()
    end.send_bytes(pickle.dumps("ready"))
    if rank == ODD_ONE:
        time.sleep(600)
    end.recv_bytes()
    for _ in range(2):
        began = time.monotonic()
        told = message(lambda: head(x, y).backward())
        end.send_bytes(pickle.dumps((told, time.monotonic() - began)))


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_rank_that_dies_or_hangs_leaves_the_others_with_an_error_in_time(how: str) -> None:
    with bare_processes(3, until_one_dies) as (processes, ends):
        for end in ends:
            assert end.poll(2 * DEADLINE)
            end.recv_bytes()
        if how == "killed":
            processes[ODD_ONE].kill()
            processes[ODD_ONE].join()
        survivors = [end for rank, end in enumerate(ends) if rank != ODD_ONE]
        for end in survivors:
            end.send_bytes(b"go on")
        for end in survivors:
            for _ in range(2):  # whoever catches the error and tries again is not caught by a hang
                assert end.poll(TIMEOUT + DEADLINE)
                told, seconds = pickle.loads(end.recv_bytes())
                assert OF_THE_GROUP.match(told), told
                # Two collectives at most end by time: the step's own, and what a rank with an error sends.
                assert seconds < 2 * TIMEOUT + 10
