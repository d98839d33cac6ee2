"""Follow the buffers of a compiled loop: is one overwritten while a matrix product still reads it?

Triton keeps the tiles of a pipelined loop in rings of buffers. An asynchronous product (wgmma, tcgen05) goes
on reading its two buffers after the instruction that starts it, until a wait says otherwise; a copy into one
of them meanwhile is a race, which depends on timing and which only the compiled code shows. This module runs
the integers of a kernel's TTGIR (ring positions, phases of barriers), not its data, over some iterations of
every loop, and compares what each copy writes with what the products in flight read.

It never passes over what it does not understand: a warp-specialized kernel, a position or phase that it
cannot work out, an unknown operation on a buffer is a problem like a race.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from expface_kernels.workshop.ttgir import Operation, parse

ITERATIONS = 40
"""Of a loop with products: more than the common period of its rings and of the phases of its barriers."""
OUTER_ITERATIONS = 3

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "xori": operator.xor,
    "andi": operator.and_, "ori": operator.or_, "minsi": min, "maxsi": max, "minui": min, "maxui": max,
    "divsi": lambda a, b: int(a / b), "remsi": lambda a, b: a - b * int(a / b),
    "divui": operator.floordiv, "remui": operator.mod,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt,
    "sge": operator.ge, "ult": operator.lt, "ule": operator.le, "ugt": operator.gt, "uge": operator.ge,
}  # fmt: skip
_VIEWS = ("memdesc_trans", "memdesc_subslice", "memdesc_reshape", "memdesc_reinterpret")
_WRITES = ("async_copy_global_to_local", "async_tma_copy_global_to_local", "async_tma_gather", "local_store")
_PRODUCTS = ("warp_group_dot", "tc_gen5_mma", "tc_gen5_mma_scaled")
_WAITS = ("warp_group_dot_wait", "wait_barrier", "tc_gen5_commit", "arrive_barrier", "init_barrier")
# They neither write a tile in shared memory nor end a product.
_HARMLESS = {
    "local_load", "inval_barrier", "barrier_expect", "fence_async_shared",
    "async_tma_copy_local_to_global", "async_tma_store_wait", "tmem_alloc", "tmem_load", "tmem_store",
}  # fmt: skip


class Buffer(NamedTuple):
    """A place in shared memory: an allocation, and the position in its ring, if it is one."""

    allocation: str
    position: tuple[int, ...] = ()
    """Empty: all of it; an index of an index has two numbers."""
    barrier: bool = False

    def overlaps(self, other: Buffer) -> bool:
        common = min(len(self.position), len(other.position))
        return self.allocation == other.allocation and self.position[:common] == other.position[:common]


class _Unknown:
    """Stands for a buffer or barrier that could not be worked out."""


UNKNOWN = _Unknown()
Value = int | Buffer | _Unknown | None  # None: data, or an integer that could not be worked out


class Loop(NamedTuple):
    """A loop with asynchronous products and no further such loop inside."""

    line: int
    in_flight: int
    """Products that may still be running when an iteration ends, at most: 0 where nothing overlaps."""


class Report(NamedTuple):
    """What was found in a kernel."""

    loops: list[Loop]
    problems: list[str]
    """Races, and what was not understood."""


@dataclass
class _Product:
    number: int
    reads: list[Buffer]
    kind: str


def check(ttgir: str) -> Report:
    """Return the loops of a kernel with asynchronous products, and every race and doubt in it."""
    operations = parse(ttgir)
    everything = [inner for outer in operations for inner in (outer, *outer.inside())]
    products = [op for op in everything if _asynchronous(op)]
    if not products:
        return Report([], [])
    specialized = [op for op in everything if op.name in ("warp_specialize", "while", "call")]
    if specialized:
        first = specialized[0]
        return Report([], [f"not understood: line {first.line}: {first.name} beside asynchronous products"])
    run = _Run()
    for function in operations:
        run.block([function] if function.name != "func" else function.regions[0])
    unseen = [op for op in products if op.line not in run.seen]
    run.problems += [f"not understood: line {op.line}: {op.name} was never reached" for op in unseen]
    loops = [Loop(line, in_flight) for line, in_flight in sorted(run.loops.items())]
    return Report(loops, list(dict.fromkeys(run.problems)))


def _matters(op: Operation) -> bool:
    """Tell whether leaving the operation out could hide a race or invent one."""
    makes = op.name == "local_alloc" and op.operands.startswith("%")
    return makes or op.name in (*_WRITES, *_PRODUCTS, *_WAITS, "for")


def _asynchronous(op: Operation) -> bool:
    if op.name == "warp_group_dot":
        return "isAsync = true" in op.operands
    return op.name.startswith("tc_gen5_mma")


class _Run:
    """One walk through a kernel: values by name, products in flight, arrivals at barriers."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.in_flight: list[_Product] = []
        self.issued = 0
        # Of each barrier: the products that had been started at each arrival; arrivals known to be complete.
        self.arrivals: dict[Buffer, list[int]] = {}
        self.passed: dict[Buffer, int] = {}
        self.loops: dict[int, int] = {}
        self.seen: set[int] = set()  # lines of products
        self.freed: set[str] = set()  # allocations
        self.problems: list[str] = []

    def block(self, operations: list[Operation]) -> list[Value]:
        """Run a region; return what it yields."""
        for op in operations:
            if op.name == "yield":
                return [self.values.get(name) for name in op.names()]
            self.step(op)
        return []

    def step(self, op: Operation) -> None:
        handler = getattr(self, f"_{op.name}", None)
        arguments = [self.values.get(name) for name in op.names()]
        if handler is not None:
            results = handler(op, arguments)
        elif op.name in _ARITHMETIC:
            results = [_applied(_ARITHMETIC[op.name], arguments)]
        elif op.name in _VIEWS or op.name in ("extsi", "extui", "trunci", "index_cast"):
            results = arguments[:1]
        elif op.name in _WRITES:
            results = self._write(op, arguments)
        else:
            results = []
            touched = [v for v in arguments if isinstance(v, Buffer | _Unknown)]
            if touched and self.in_flight and op.name not in _HARMLESS:
                self._doubt(op, "an operation on a buffer while products are in flight")
            if any(_matters(inner) for inner in op.inside()):
                self._doubt(op, "copies, products or waits inside an unknown operation")
            if op.name in ("br", "cond_br", "switch") and self.in_flight:
                self._doubt(op, "a branch while products are in flight")
        missing: Value = UNKNOWN if "#smem" in op.operands.rpartition("->")[2] else None
        for i, name in enumerate(op.results):
            self.values[name] = results[i] if i < len(results) else missing

    def _doubt(self, op: Operation, what: str) -> None:
        self.problems.append(f"not understood: line {op.line}: {op.name}: {what}")

    def _constant(self, op: Operation, arguments: list[Value]) -> list[Value]:
        text = op.operands.split(" : ")[0].split(" {")[0].strip()
        known = {"true": 1, "false": 0}
        return [known[text] if text in known else int(text) if re.fullmatch(r"-?\d+", text) else None]

    def _cmpi(self, op: Operation, arguments: list[Value]) -> list[Value]:
        return [_applied(_COMPARISONS[op.operands.split(",")[0].strip()], arguments)]

    def _select(self, op: Operation, arguments: list[Value]) -> list[Value]:
        condition, yes, no = arguments
        if isinstance(condition, int):
            return [yes if condition else no]
        buffers = isinstance(yes, Buffer | _Unknown) or isinstance(no, Buffer | _Unknown)
        return [yes if yes == no else UNKNOWN if buffers else None]

    def _local_alloc(self, op: Operation, arguments: list[Value]) -> list[Value]:
        made = Buffer(op.results[0], (), "xi64" in op.operands)
        if arguments:  # made of a value, which is a write
            self._check(op, made)
            if any(read.allocation in self.freed for product in self.in_flight for read in product.reads):
                self._doubt(op, "it may get the memory of a freed buffer that a product still reads")
        return [made]

    def _memdesc_index(self, op: Operation, arguments: list[Value]) -> list[Value]:
        if "#smem" not in op.operands:  # tensor memory, which holds accumulators
            return [None]
        ring, position = arguments
        if isinstance(ring, Buffer) and isinstance(position, int):
            return [ring._replace(position=(*ring.position, position))]
        return [UNKNOWN]

    def _write(self, op: Operation, arguments: list[Value]) -> list[Value]:
        places = [v for v in arguments if isinstance(v, Buffer | _Unknown)]
        places = [v for v in places if not (isinstance(v, Buffer) and v.barrier)]
        predicated = op.name.startswith("async_tma") and arguments[-1] == 0
        if not predicated and not places:
            self._doubt(op, "it writes nowhere that can be followed")
        for place in () if predicated else places:
            self._check(op, place)
        return [None]  # a token

    def _check(self, op: Operation, place: Buffer | _Unknown) -> None:
        """Complain if a product in flight reads what `op` writes."""
        if isinstance(place, _Unknown):
            if self.in_flight:
                self._doubt(op, "its place could not be worked out")
            return
        if any(place.overlaps(read) for product in self.in_flight for read in product.reads):
            where = place.allocation + "".join(f"[{i}]" for i in place.position)
            self.problems.append(f"race: line {op.line}: {op.name} into {where}, which a product still reads")

    def _start(self, op: Operation, arguments: list[Value]) -> None:
        """Put a product in flight, which reads all the buffers among its arguments but barriers."""
        reads = [v for v in arguments if isinstance(v, Buffer) and not v.barrier]
        typed = op.operands.rpartition(" : ")[2].split("->")[0]
        if sum("#smem" in t and "xi64" not in t for t in re.findall(r"memdesc<[^>]*>", typed)) != len(reads):
            self._doubt(op, "an operand could not be worked out")
        self.issued += 1
        self.seen.add(op.line)
        self.in_flight.append(_Product(self.issued, reads, op.name))

    def _warp_group_dot(self, op: Operation, arguments: list[Value]) -> list[Value]:
        self._start(op, arguments)
        if not _asynchronous(op):
            self.in_flight.clear()
        return []

    def _warp_group_dot_wait(self, op: Operation, arguments: list[Value]) -> list[Value]:
        found = re.search(r"pendings = (\d+)", op.operands)
        if found is None:
            self._doubt(op, "no number of pending products")
        else:
            self.in_flight = self.in_flight[len(self.in_flight) - int(found[1]) :] if int(found[1]) else []
        return arguments

    def _tc_gen5_mma(self, op: Operation, arguments: list[Value]) -> list[Value]:
        barriers = [v for v in arguments[2:] if isinstance(v, Buffer) and v.barrier]
        if not barriers and "is_async" in op.operands:
            self._start(op, arguments)  # a commit follows
            return []
        if not barriers or any(isinstance(v, _Unknown) for v in arguments[2:]):
            self._doubt(op, "no barrier that can be followed")
        self._start(op, arguments)
        for barrier in barriers:
            self._arrive(barrier)
        return []

    _tc_gen5_mma_scaled = _tc_gen5_mma

    def _tc_gen5_commit(self, op: Operation, arguments: list[Value]) -> list[Value]:
        if isinstance(arguments[0], Buffer):
            self._arrive(arguments[0])
        else:
            self._doubt(op, "its barrier could not be worked out")
        return []

    def _arrive(self, barrier: Buffer) -> None:
        self.arrivals.setdefault(barrier, []).append(self.issued)

    def _arrive_barrier(self, op: Operation, arguments: list[Value]) -> list[Value]:
        self._doubt(op, "an arrival that is no product's")
        return []

    def _local_dealloc(self, op: Operation, arguments: list[Value]) -> list[Value]:
        if isinstance(arguments[0], Buffer):
            self.freed.add(arguments[0].allocation)
        return []

    def _init_barrier(self, op: Operation, arguments: list[Value]) -> list[Value]:
        barrier = arguments[0]
        if isinstance(barrier, Buffer):
            self.arrivals.pop(barrier, None)
            self.passed.pop(barrier, None)
        return []

    def _wait_barrier(self, op: Operation, arguments: list[Value]) -> list[Value]:
        barrier, phase = arguments[:2]
        predicated = len(op.operands.split(" deps ")[0].split(" : ")[0].split(",")) > 2
        if predicated and arguments[2] == 0:
            return []
        if not isinstance(barrier, Buffer) or not isinstance(phase, int):
            if self.in_flight:
                self._doubt(op, "its barrier or phase could not be worked out")
            return []
        arrivals = self.arrivals.get(barrier)
        if arrivals is None:  # it waits for a copy, which ends no product
            return []
        if predicated and arguments[2] is None:
            self._doubt(op, "whether it waits could not be worked out")
            return []
        # It returns once the number of completed arrivals has the other parity than the phase, at the least.
        passed = self.passed.get(barrier, 0)
        passed += passed % 2 != (phase + 1) % 2
        self.passed[barrier] = passed
        if 0 < passed <= len(arrivals):
            # Products of the tensor core end in the order in which they were started.
            done = arrivals[passed - 1]
            self.in_flight = [product for product in self.in_flight if product.number > done]
        return []

    def _for(self, op: Operation, arguments: list[Value]) -> list[Value]:
        header = re.match(r"(%\S+) = (%\S+) to (%\S+) step (%\S+)(.*)", op.operands)
        if header is None:
            self._doubt(op, "the head of a loop")
            return []
        variable, *bounds = header.groups()[:4]
        first, last, step = (self.values.get(name) for name in bounds)
        carried = re.search(r"iter_args\((.*?)\) ->", header[5])
        pairs = [pair.split(" = ") for pair in carried[1].split(", ")] if carried else []
        values = [self.values.get(name) for _, name in pairs]
        inner_loops = [inner for inner in op.inside() if inner.name == "for"]
        nested = any(any(map(_asynchronous, inner.inside())) for inner in inner_loops)
        innermost = not nested and any(map(_asynchronous, op.inside()))
        times = OUTER_ITERATIONS if nested else ITERATIONS
        if isinstance(first, int) and isinstance(last, int) and isinstance(step, int):
            times = min(times, max(0, -(-(last - first) // step)))
        for i in range(times):
            counted = isinstance(first, int) and isinstance(step, int)
            self.values[variable] = first + i * step if counted else None  # type: ignore
            self.values.update(zip((name for name, _ in pairs), values, strict=True))
            values = self.block(op.regions[0])
            if innermost:
                self.loops[op.line] = max(self.loops.get(op.line, 0), len(self.in_flight))
        return values

    def _if(self, op: Operation, arguments: list[Value]) -> list[Value]:
        condition = arguments[0]
        if isinstance(condition, int):
            chosen = op.regions[0] if condition else op.regions[1] if len(op.regions) > 1 else []
            return self.block(chosen)
        # Leaving out a wait can only make this check stricter; anything else would be a guess.
        stricter = ("warp_group_dot_wait", "wait_barrier")
        if any(_matters(inner) and inner.name not in stricter for inner in op.inside()):
            self._doubt(op, "copies or products under a condition that could not be worked out")
        return []


def _applied(function: Callable[[int, int], int], arguments: list[Value]) -> Value:
    first, second = arguments[:2] if len(arguments) > 1 else (None, None)
    if isinstance(first, int) and isinstance(second, int):
        return int(function(first, second)) if second or function is not operator.mod else None
    return None
