"""The ranks of a process group: every collective of the package, and failing together instead of hanging.

A training step sends, in this order: a header of five int64 a rank (`exchange`; not with equal_rows), the
rows and their labels (`gather_embeddings`, `gather`), then log l and theta of all rows (`combine`); its
backward sends the rows' gradient. Statistics, a margin with one value per row and reduction="none" add one
each. Nothing here grows with the classes.

A rank that cannot go on says so where the others listen, and all raise: in `all_or_none` a collective of its
own asks every rank; inside a step the failure travels in the header (`refuse_exchange`) or with the values of
a margin (`refuse_gather`), so that a step that goes well sends nothing more.

W ranks · B rows of this rank · N rows of all ranks, by rank · D features · eqs.: docs/math.md
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from expface_kernels.checks import FLOATS, check_process_group

LARGEST_SUMMED_SCALE = 70.0
"""Up to here exp(s·cos) of all ranks is added up in float64 as it is; above, by log-sum-exp."""


class Header(NamedTuple):
    """What ranks tell each other before rows: five int64."""

    rows: int
    dtype: int
    """Of the rows, a position in FLOATS."""
    needs_grad: int
    """1: the rows want a gradient."""
    failed: int
    """1: this rank's arguments were refused."""
    options: int
    """A checksum over everything that must be the same on every rank."""


class Group:
    """The ranks of one process group, or this process alone where there is none.

    Every rank calls each method that sends something, with as many and as large tensors as it says. On one
    process without a group, nothing is sent.

    Args:
        process_group: of torch.distributed, one that this process belongs to; None is this process alone.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group
        self.rank, self.size = 0, 1
        if process_group is not None:
            check_process_group(process_group)
            # Asked of the group itself: torch.distributed's functions look at the default group too.
            self.rank, self.size = process_group.rank(), process_group.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copied head talks to the same ranks; a process group cannot be copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "process_group: a head that shares its classes cannot be pickled; save its state_dict(), or for "
            "any number of ranks use save_sharded or save_centres of expface_kernels.checkpoint"
        )

    @property
    def device(self) -> torch.device:
        """Where tensors must be for this group to send them."""
        if self.process_group is not None and dist.get_backend(self.process_group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    # Agreeing

    @contextlib.contextmanager
    def all_or_none(self, what: str, error: type[Exception] = RuntimeError) -> Iterator[None]:
        """What is done inside succeeds on every rank, or every rank raises; one `gather_json` at its end.

        A rank that failed raises its own error, the others one of type `error`, which names each rank that
        refused `what` and says why. On one process nothing is changed.
        """
        try:
            yield
        except Exception as own:  # whatever it is, the others must not wait for this rank
            self.gather_json(_text(own))
            raise
        self._raise_refusals(self.gather_json(None), what, error)

    def gather_json(self, value: Any) -> list[Any]:
        """One value per rank, of what JSON can hold, by rank: two all_gathers, of lengths and of text.

        To read what another process sent runs no code.
        """
        text = json.dumps(value).encode()
        if self.process_group is None:
            return [json.loads(text)]
        length = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        lengths = self._all_gather(length).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = self._all_gather(padded.to(self.device)).view(self.size, -1).cpu()
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(texts, lengths, strict=True)]

    def agree(self, options: dict[str, str], what: str = "this call") -> None:
        """ValueError on every rank unless all say the same, or where one is in `refuse`; one `gather_json`.

        The error names what differs, the values and their ranks. options: name to value as text.
        """
        if self.process_group is not None:
            self._agree({"error": None, "options": options}, what)

    def refuse(self, error: Exception, what: str = "this call") -> None:
        """Take the place of `agree` on a rank that is about to raise: the others raise too."""
        if self.process_group is not None:
            with contextlib.suppress(ValueError):  # what all ranks are told; here the error itself is better
                self._agree({"error": _text(error), "options": {}}, what)

    def _agree(self, own: dict[str, Any], what: str) -> None:
        everyone = self.gather_json(own)
        self._raise_refusals([one["error"] for one in everyone], what, ValueError)
        differing = []
        for name in dict.fromkeys(name for one in everyone for name in one["options"]):
            by_value: dict[str, list[int]] = {}
            for rank, one in enumerate(everyone):
                if name in one["options"]:
                    by_value.setdefault(one["options"][name], []).append(rank)
            if len(by_value) > 1:
                values = ", ".join(f"{value} on {_ranks(where)}" for value, where in by_value.items())
                differing.append(f"{name}: expected the same on every rank of process_group, got {values}")
        if differing:
            raise ValueError("; ".join(differing))

    def _raise_refusals(self, texts: list[str | None], what: str, error: type[Exception]) -> None:
        refused = [
            f"rank {rank} of process_group refused {what}: {text}"
            for rank, text in enumerate(texts)
            if text is not None
        ]
        if refused:
            raise error("; ".join(refused))

    # The header of a step

    def exchange(self, x: Tensor, options: dict[str, str]) -> tuple[Tensor, list[int]]:
        """The rows (B, D), cast as all ranks' are, and how many each rank has: one all_gather, read here.

        ValueError on every rank where one is in `refuse_exchange` or where options differ; only then is text
        sent too. A rank without rows takes on the others' dtype and need of a gradient.
        """
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        own = Header(x.shape[0], FLOATS.index(x.dtype), int(needs_grad), 0, _checksum(options))
        headers = self._headers(own)
        if any(h.failed for h in headers) or len({h.options for h in headers}) > 1:
            self.agree(options)
        filled = [h for h in headers if h.rows]
        if len({(h.dtype, h.needs_grad) for h in filled}) > 1:
            self.agree({"embeddings": f"{x.dtype}, requires_grad={needs_grad}"} if own.rows else {})
        if filled:
            x = x.to(FLOATS[filled[0].dtype])  # still part of the backbone's graph, for which DDP waits
            if filled[0].needs_grad != own.needs_grad:
                x = x.detach().requires_grad_(bool(filled[0].needs_grad))
        return x, [h.rows for h in headers]

    def refuse_exchange(self, error: Exception) -> None:
        """Take the place of `exchange` on a rank that is about to raise."""
        self._headers(Header(0, 0, 0, 1, 0))
        self.refuse(error)

    def _headers(self, own: Header) -> list[Header]:
        sent = torch.tensor([own], dtype=torch.int64, device=self.device)
        return [Header(*words) for words in self._all_gather(sent).tolist()]

    # Rows and what is found about them

    def own_slice(self, rows: list[int]) -> slice:
        """Where this rank's rows are among the N."""
        start = sum(rows[: self.rank])
        return slice(start, start + rows[self.rank])

    def gather(self, own: Tensor, rows: list[int]) -> Tensor:
        """Rows (B, …) of every rank, by rank: (N, …); no gradient. One all_gather of max(rows) rows."""
        largest = max(rows)
        if largest == 0:
            return own
        everyone = self._all_gather(_padded(own, largest))
        if min(rows) == largest:
            return everyone
        return torch.cat([part[:n] for part, n in zip(everyone.split(largest), rows, strict=True)])

    def gather_or_refuse(self, own: Tensor, rows: list[int]) -> Tensor:
        """`gather` rows (B, k) float64, and one more a rank that says whether it goes on; read on the host.

        ValueError where a rank is in `refuse_gather` instead.
        """
        everyone = self._gather_flagged(own, False, rows)
        if bool(everyone[:, -1].any()):
            self.agree({})
        return torch.cat([part[:n] for part, n in zip(everyone, rows, strict=True)])

    def refuse_gather(self, width: int, rows: list[int], error: Exception) -> None:
        """Take the place of `gather_or_refuse` of rows (B, width) on a rank that is about to raise."""
        nothing = torch.zeros((rows[self.rank], width), dtype=torch.float64, device=self.device)
        self._gather_flagged(nothing, True, rows)
        self.refuse(error)

    def _gather_flagged(self, own: Tensor, flag: bool, rows: list[int]) -> Tensor:
        """(W, max(rows) + 1, k): every rank's rows, the last of which is its flag."""
        largest = max(rows)
        sent = _padded(own, largest + 1)
        sent[largest] = flag
        return self._all_gather(sent).view(self.size, largest + 1, -1)

    def gather_embeddings(self, x: Tensor, rows: list[int], grad_scale: float) -> Tensor:
        """`gather`; backward sums what all ranks found for a row, times grad_scale: one reduce_scatter."""
        if max(rows) == 0:
            return x
        gathered: Tensor = _GatherEmbeddings.apply(x, rows, grad_scale, self)
        return gathered

    def combine(self, log_l: Tensor, theta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """log l and theta (N,) float64 over all classes, from those of each rank's (eq. 12); one collective.

        theta is 0 on all ranks but the target's. Backward needs no collective: every rank has the whole
        gradient, since all compute the same loss, and takes its share of the sum.
        """
        if log_l.shape[0] == 0:
            return log_l, theta
        combined: tuple[Tensor, Tensor] = _Combine.apply(log_l, theta, scale, self)
        return combined

    def own_losses(self, losses: Tensor, rows: list[int]) -> Tensor:
        """This rank's (B,) of the losses (N,); backward gathers every rank's gradient: one all_gather."""
        if max(rows) == 0:
            return losses
        own: Tensor = _OwnLosses.apply(losses, rows, self)
        return own

    def hardest(self, cos: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The largest negative cosine (N,) float64 over all ranks and its class (N,) int64; one all_gather.

        Class numbers travel as float64, which holds them exactly up to 2^53.
        """
        if cos.shape[0] == 0:
            return cos, classes
        everyone = self._all_gather(torch.stack([cos, classes.double()])[None])
        best, where = everyone[:, 0].max(0)
        return best, everyone[:, 1].gather(0, where[None])[0].long()

    def nearest(self, cos: Tensor, classes: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        """Merge each rank's k nearest classes, cosines and numbers (N, k), for this rank's rows: (B, k)."""
        k = cos.shape[1]
        everyone = self._all_gather(torch.stack([cos.double(), classes.double()])[None])[:, :, own]
        candidates, named = everyone.permute(1, 2, 0, 3).flatten(2)
        best, order = candidates.topk(k, dim=1)
        return best, named.gather(1, order).long()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the device of `values`, which stay as they are; one all_reduce."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks, likewise."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def _all_reduce(self, values: Tensor, op: Any) -> Tensor:
        if self.process_group is None:
            return values
        # NCCL cannot send what a rank without rows still has on the CPU.
        sent = values.detach().to(self.device) if self.device.type == "cuda" else values.detach()
        sent = sent.clone() if sent.data_ptr() == values.data_ptr() else sent
        dist.all_reduce(sent, op=op, group=self.process_group)
        return sent.to(values.device)

    def _all_gather(self, own: Tensor) -> Tensor:
        """(n, …) of every rank, which must all have one shape: (W·n, …)."""
        everyone = own.new_empty((self.size * own.shape[0], *own.shape[1:]))
        send = _named("all_gather_single", "all_gather_into_tensor")
        send(everyone, own.detach().contiguous(), group=self.process_group)
        return everyone

    def _reduce_scatter(self, own: Tensor, everyone: Tensor) -> None:
        """own (n, …) = the sum over ranks of this rank's part of (W·n, …)."""
        send = _named("reduce_scatter_single", "reduce_scatter_tensor")
        send(own, everyone, group=self.process_group)


@contextlib.contextmanager
def telling(tell: Callable[[Exception], None] | None) -> Iterator[None]:
    """Call `tell` with an error that is raised inside, before it goes on: a `refuse…` of a Group, or None."""
    try:
        yield
    except Exception as error:
        if tell is not None:
            tell(error)
        raise


class _GatherEmbeddings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], grad_scale: float, group: Group) -> Tensor:
        ctx.rows, ctx.grad_scale, ctx.group = rows, grad_scale, group
        return group.gather(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        rows, group = ctx.rows, ctx.group
        largest = max(rows)
        # Each rank's share is of the rows' dtype already; the sum is taken in float32 at least.
        sent = dx.to(torch.promote_types(dx.dtype, torch.float32))
        if min(rows) < largest:
            sent = torch.cat([_padded(part, largest) for part in sent.split(rows)])
        own = sent.new_empty((largest, *sent.shape[1:]))
        group._reduce_scatter(own, sent.contiguous())
        return (own[: rows[group.rank]] * ctx.grad_scale).to(dx.dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_l: Tensor, theta: Tensor, scale: float, group: Group) -> tuple[Tensor, Tensor]:
        if scale <= LARGEST_SUMMED_SCALE:
            sums = torch.stack([torch.exp(log_l), theta])
            dist.all_reduce(sums, group=group.process_group)
            total, angle = torch.log(sums[0]), sums[1]
        else:
            parts = group._all_gather(torch.stack([log_l, theta])[None])
            total, angle = torch.logsumexp(parts[:, 0], 0), parts[:, 1].sum(0)
        ctx.save_for_backward(torch.exp(log_l - total))
        return total, angle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_log_l: Tensor, g_theta: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (share,) = ctx.saved_tensors
        # The share of a row may be NaN: of an ignored one, or of one with no negative on any rank.
        return torch.where(g_log_l == 0, 0.0, g_log_l * share), g_theta, None, None


class _OwnLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, rows: list[int], group: Group) -> Tensor:
        ctx.rows, ctx.group = rows, group
        return losses[group.own_slice(rows)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.gather(g, ctx.rows), None, None


def _checksum(options: dict[str, str]) -> int:
    """63 bits that differ where the options do."""
    digest = hashlib.blake2b(json.dumps(options).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _text(error: Exception) -> str:
    """What the other ranks are told; whose text alone would say little is named."""
    named = not isinstance(error, (TypeError, ValueError, RuntimeError))
    return f"{type(error).__name__}: {error}" if named else str(error)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _padded(own: Tensor, rows: int) -> Tensor:
    """(B, …) with zeros below it, (rows, …)."""
    missing = rows - own.shape[0]
    return own if missing == 0 else torch.cat([own, own.new_zeros((missing, *own.shape[1:]))])


def _named(new: str, old: str) -> Callable[..., Any]:
    """torch.distributed's function, by the name that torch 2.13 gave it or its older one."""
    found: Callable[..., Any] = getattr(dist, new, None) or getattr(dist, old)
    return found
