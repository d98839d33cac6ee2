"""Every collective of the sharded head: what is sent, and how gradients pass through it.

A step sends, in this order: one int64 a rank (`exchange`; not with equal_rows), the rows and their labels
(`gather`), then log l and theta of all rows (`combine`); its backward sends the rows' gradient. Statistics, a
margin with a value a row and reduction="none" add one each. Nothing here grows with the classes.

A rank that cannot go on says so where the others listen: in `exchange` (by `tell_of_failure`) or in
`gather_unless_refused` (by `refuse_to_gather`). Then all raise, and none waits for one that has left.

W ranks · B rows of this rank · N rows of all ranks, by rank · D features · eqs.: docs/math.md
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from expface_kernels.checks import FLOATS, check_process_group

LARGEST_SUMMED_SCALE = 70.0
"""Up to here exp(s·cos) of all ranks is added up in float64 as it is; above, by log-sum-exp."""


class Ranks:
    """The ranks of one process group, and which of them this process is."""

    def __init__(self, process_group: Any) -> None:
        check_process_group(process_group)
        self.group = process_group
        # Asked of the group itself: torch.distributed's functions look at the default group too.
        self.rank: int = process_group.rank()
        self.size: int = process_group.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copied head talks to the same ranks; a group itself cannot be copied

    @property
    def device(self) -> torch.device:
        """Where tensors must be for this group to send them."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


class Header(NamedTuple):
    """What ranks tell each other before rows: it packs into one int64."""

    rows: int
    dtype: torch.dtype
    needs_grad: bool
    """The rows want a gradient."""
    failed: bool
    """This rank's arguments were refused."""
    options: int
    """24 bits of a checksum over everything that must be the same on every rank."""

    def pack(self) -> int:
        dtype, needs_grad, failed = FLOATS.index(self.dtype), int(self.needs_grad), int(self.failed)
        return self.rows | dtype << 32 | needs_grad << 36 | failed << 37 | self.options << 38

    @classmethod
    def unpack(cls, word: int) -> Header:
        return cls(
            rows=word & 0xFFFFFFFF,
            dtype=FLOATS[word >> 32 & 0xF],
            needs_grad=bool(word >> 36 & 1),
            failed=bool(word >> 37 & 1),
            options=word >> 38,
        )


def checksum(options: dict[str, str]) -> int:
    """24 bits that differ, nearly always, where the options do."""
    return zlib.crc32(json.dumps(options).encode()) & 0xFFFFFF


def exchange(header: Header, options: dict[str, str], error: str | None, ranks: Ranks) -> list[Header]:
    """All ranks' headers: one all_gather of one int64, read on the host.

    ValueError on every rank where one refused its arguments or where options differ; ranks without rows
    take on the others' dtype and need of a gradient. Only then is text sent too.
    """
    word = torch.tensor([header.pack()], dtype=torch.int64, device=ranks.device)
    headers = [Header.unpack(word) for word in _all_gather(word, ranks).tolist()]
    if any(h.failed for h in headers) or len({h.options for h in headers}) > 1:
        check_agreement(options, error, ranks, "this call")
    filled = [h for h in headers if h.rows]
    kinds = {(h.dtype, h.needs_grad) for h in filled}
    if len(kinds) > 1:
        told = {"embeddings": f"{header.dtype}, requires_grad={header.needs_grad}"} if header.rows else {}
        check_agreement(told, None, ranks, "this call")
    if filled:
        dtype, needs_grad = filled[0].dtype, filled[0].needs_grad
        headers = [h._replace(dtype=dtype, needs_grad=needs_grad) for h in headers]
    return headers


def tell_of_failure(error: Exception, ranks: Ranks) -> None:
    """In `exchange`'s place on a rank that is about to raise: the others raise too, and wait for nobody."""
    header = Header(0, torch.float32, False, True, 0)
    with contextlib.suppress(ValueError):  # what all ranks are told; here the error itself is better
        exchange(header, {}, _text(error), ranks)


def tell_of_error(error: Exception, ranks: Ranks, what: str) -> None:
    """The same in `check_agreement`'s place."""
    with contextlib.suppress(ValueError):
        check_agreement({}, _text(error), ranks, what)


def _text(error: Exception) -> str:
    """What the other ranks are told; whose text alone would say little is named."""
    return str(error) if isinstance(error, (TypeError, ValueError, RuntimeError)) else repr(error)


def check_agreement(told: dict[str, str], error: str | None, ranks: Ranks, what: str) -> None:
    """ValueError on every rank, naming ranks and values, unless all ranks say the same and none has an error.

    told: name → value as text. Two all_gathers: of the lengths, of the text.
    """
    own = json.dumps({"error": error, "told": told}).encode()
    length = torch.tensor([len(own)], dtype=torch.int64, device=ranks.device)
    lengths = _all_gather(length, ranks).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    texts = _all_gather(padded.to(ranks.device), ranks).view(ranks.size, -1).cpu()
    said = [json.loads(bytes(text[:n].tolist())) for text, n in zip(texts, lengths, strict=True)]
    for rank, one in enumerate(said):
        if one["error"] is not None:
            raise ValueError(f"rank {rank} of process_group refused {what}: {one['error']}")
    names = dict.fromkeys(name for one in said for name in one["told"])
    differing = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(said):
            if name in one["told"]:
                by_value.setdefault(one["told"][name], []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on {_ranks(where)}" for value, where in by_value.items())
            differing.append(f"{name}: expected the same on every rank of process_group, got {values}")
    if differing:
        raise ValueError("; ".join(differing))


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def gather(own: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
    """Rows (B, …) of every rank, by rank: (N, …); no gradient. One all_gather of max(rows) rows a rank."""
    largest = max(rows)
    if largest == 0:
        return own
    everyone = _all_gather(_padded(own, largest), ranks)
    if min(rows) == largest:
        return everyone
    return torch.cat([part[:n] for part, n in zip(everyone.split(largest), rows, strict=True)])


def gather_unless_refused(own: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
    """`gather` of rows (B, k) float64, and of one more a rank that says whether it goes on; read on the host.

    ValueError where a rank calls `refuse_to_gather` instead.
    """
    everyone = _with_flags(own, False, rows, ranks)
    if bool(everyone[:, -1].any()):
        check_agreement({}, None, ranks, "this call")
    return torch.cat([part[:n] for part, n in zip(everyone, rows, strict=True)])


def refuse_to_gather(width: int, error: Exception, rows: list[int], ranks: Ranks) -> None:
    """On a rank that is about to raise, where the others gather rows (B, width): they raise too."""
    nothing = torch.zeros((rows[ranks.rank], width), dtype=torch.float64, device=ranks.device)
    _with_flags(nothing, True, rows, ranks)
    tell_of_error(error, ranks, "this call")


def _with_flags(own: Tensor, flag: bool, rows: list[int], ranks: Ranks) -> Tensor:
    """(W, max(rows) + 1, k): every rank's rows, the last of which is its flag."""
    largest = max(rows)
    sent = _padded(own, largest + 1)
    sent[largest] = flag
    return _all_gather(sent, ranks).view(ranks.size, largest + 1, -1)


def own_slice(rows: list[int], ranks: Ranks) -> slice:
    """Where this rank's rows are among the N."""
    start = sum(rows[: ranks.rank])
    return slice(start, start + rows[ranks.rank])


def gather_embeddings(x: Tensor, rows: list[int], grad_scale: float, ranks: Ranks) -> Tensor:
    """Like `gather`; backward sums what all ranks found for a row, times grad_scale: one reduce_scatter."""
    if max(rows) == 0:
        return x
    gathered: Tensor = _GatherEmbeddings.apply(x, rows, grad_scale, ranks)
    return gathered


class _GatherEmbeddings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], grad_scale: float, ranks: Ranks) -> Tensor:
        ctx.rows, ctx.grad_scale, ctx.ranks = rows, grad_scale, ranks
        return gather(x, rows, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        rows, ranks = ctx.rows, ctx.ranks
        largest = max(rows)
        # Each rank's share is of the rows' dtype already; the sum is taken in float32 at least.
        sent = dx.to(torch.promote_types(dx.dtype, torch.float32))
        if min(rows) < largest:
            sent = torch.cat([_padded(part, largest) for part in sent.split(rows)])
        own = sent.new_empty((largest, *sent.shape[1:]))
        _reduce_scatter(own, sent.contiguous(), ranks)
        return (own[: rows[ranks.rank]] * ctx.grad_scale).to(dx.dtype), None, None, None


def combine(log_l: Tensor, theta: Tensor, scale: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """log l and theta (N,) float64 over all classes, from those over each rank's (eq. 12); one collective.

    theta is 0 on all ranks but the target's. Backward needs no collective: every rank has the whole
    gradient, since all compute the same loss, and takes its share of the sum.
    """
    if log_l.shape[0] == 0:
        return log_l, theta
    combined: tuple[Tensor, Tensor] = _Combine.apply(log_l, theta, scale, ranks)
    return combined


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_l: Tensor, theta: Tensor, scale: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
        if scale <= LARGEST_SUMMED_SCALE:
            sums = torch.stack([torch.exp(log_l), theta])
            dist.all_reduce(sums, group=ranks.group)
            total, angle = torch.log(sums[0]), sums[1]
        else:
            parts = _all_gather(torch.stack([log_l, theta])[None], ranks)
            total, angle = torch.logsumexp(parts[:, 0], 0), parts[:, 1].sum(0)
        ctx.save_for_backward(torch.exp(log_l - total))
        return total, angle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_log_l: Tensor, g_theta: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (share,) = ctx.saved_tensors
        # The share of a row may be NaN: of an ignored one, or of one with no negative on any rank.
        return torch.where(g_log_l == 0, 0.0, g_log_l * share), g_theta, None, None


def own_losses(losses: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
    """This rank's (B,) of the losses (N,); backward gathers every rank's gradient: one all_gather."""
    if max(rows) == 0:
        return losses
    own: Tensor = _OwnLosses.apply(losses, rows, ranks)
    return own


class _OwnLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
        ctx.rows, ctx.ranks = rows, ranks
        return losses[own_slice(rows, ranks)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return gather(g, ctx.rows, ctx.ranks), None, None


def hardest(cos: Tensor, classes: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The largest negative cosine (N,) float64 over all ranks and its class (N,) int64; one all_gather.

    Class numbers travel as float64, which holds them exactly up to 2^53.
    """
    if cos.shape[0] == 0:
        return cos, classes
    everyone = _all_gather(torch.stack([cos, classes.double()])[None], ranks)
    best, where = everyone[:, 0].max(0)
    return best, everyone[:, 1].gather(0, where[None])[0].long()


def nearest(cos: Tensor, classes: Tensor, own: slice, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Merge each rank's k nearest classes, cosines and numbers (N, k), for this rank's rows: (B, k) each."""
    k = cos.shape[1]
    everyone = _all_gather(torch.stack([cos.double(), classes.double()])[None], ranks)[:, :, own]
    candidates, named = everyone.permute(1, 2, 0, 3).flatten(2)
    best, order = candidates.topk(k, dim=1)
    return best, named.gather(1, order).long()


def all_reduce(values: Tensor, largest: bool, group: Any) -> Tensor:
    """The sum, or the largest, over a group, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return values


def _padded(own: Tensor, rows: int) -> Tensor:
    """(B, …) with zeros below it, (rows, …)."""
    missing = rows - own.shape[0]
    return own if missing == 0 else torch.cat([own, own.new_zeros((missing, *own.shape[1:]))])


def _all_gather(own: Tensor, ranks: Ranks) -> Tensor:
    """(n, …) of every rank, which must all have one shape: (W·n, …)."""
    everyone = own.new_empty((ranks.size * own.shape[0], *own.shape[1:]))
    send = _named("all_gather_single", "all_gather_into_tensor")
    send(everyone, own.detach().contiguous(), group=ranks.group)
    return everyone


def _reduce_scatter(own: Tensor, everyone: Tensor, ranks: Ranks) -> None:
    """own (n, …) = the sum over ranks of this rank's part of (W·n, …)."""
    send = _named("reduce_scatter_single", "reduce_scatter_tensor")
    send(own, everyone, group=ranks.group)


def _named(new: str, old: str) -> Callable[..., Any]:
    """torch.distributed's function, by the name that torch 2.13 gave it or its older one."""
    found: Callable[..., Any] = getattr(dist, new, None) or getattr(dist, old)
    return found
