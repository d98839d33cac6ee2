"""Read Triton's GPU intermediate representation (TTGIR) as operations, nested as their braces are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_RESULTS = re.compile(r"(%[\w$.-]+)(?::(\d+))? = ")
_LOCATION = re.compile(r"\s+loc\((?:[^()]|\([^()]*\))*\)$")


@dataclass
class Operation:
    """A line of TTGIR, and the lines inside its braces."""

    line: int
    results: list[str]
    name: str
    """Without its dialect."""
    operands: str
    """Everything after the name."""
    regions: list[list[Operation]] = field(default_factory=list)

    def names(self) -> list[str]:
        """Names of the operands, without those in the types."""
        return _NAME.findall(self.operands.split(" : ")[0])

    def inside(self) -> Iterator[Operation]:
        for region in self.regions:
            for operation in region:
                yield operation
                yield from operation.inside()


def parse(text: str) -> list[Operation]:
    """Return the operations of all functions, nested as their braces are."""
    root: list[Operation] = []
    stack: list[list[Operation]] = [root]
    owners: list[Operation] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = _LOCATION.sub("", raw.rstrip()).strip()
        if line.startswith("}"):
            if len(stack) > 1:
                stack.pop()
                owner = owners.pop()
                if line.endswith("{"):  # } else {, } do {
                    _open(owner, owners, stack)
            continue
        if not line or line.startswith(("#", "^", "//")) or line.startswith("module"):
            continue
        results = _RESULTS.match(line)
        body = line[results.end() :] if results else line
        named = re.match(r'"?(?:\w+\.)?(\w+)"?(.*)', body)
        if named is None:
            continue
        names: list[str] = []
        if results:
            count = int(results[2] or 1)
            names = [results[1]] if results[2] is None else [f"{results[1]}#{i}" for i in range(count)]
        operation = Operation(number, names, named[1], named[2].strip())
        stack[-1].append(operation)
        if line.endswith("{"):
            _open(operation, owners, stack)
    return root


def _open(owner: Operation, owners: list[Operation], stack: list[list[Operation]]) -> None:
    region: list[Operation] = []
    owner.regions.append(region)
    owners.append(owner)
    stack.append(region)
