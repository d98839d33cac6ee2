"""Break the package on purpose, one place at a time, and see whether the tests that should notice do.

    python -m lab.mutations [--list] [--only WORD …] [--jobs N]

`mutations.toml` says what is replaced in which file and which test files must turn red. Each mutation is made
in a copy of the working tree; C++ ones are compiled there. Exit status 1 where one survives, or where the
tests that must catch it fail without it. Takes some fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutations.toml")
SECONDS = 120
"""After which a test run counts as hung, which also tells that something is wrong."""


@dataclass(frozen=True)
class Mutation:
    """A fault, and who has to find it."""

    name: str
    file: str
    """Relative to the root, as the tests are."""
    old: str
    new: str
    tests: tuple[str, ...]
    """Test files or pytest node ids."""
    interpreted: bool = False
    """Whether the tests run in Triton's interpreter."""

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    verdict: str
    """Begins with "caught", or says what happened instead."""
    seconds: float


def read(path: Path = LIST) -> list[Mutation]:
    """Return the listed mutations; ValueError where one does not fit the file it is for."""
    mutations = []
    for entry in tomllib.loads(path.read_text())["mutation"]:
        mutation = Mutation(**entry | {"tests": tuple(entry["tests"])})
        count = (ROOT / mutation.file).read_text().count(mutation.old)
        if count != 1:
            raise ValueError(
                f"{mutation.name}: expected its text once in {mutation.file}, found {count} times"
            )
        mutations.append(mutation)
    return mutations


def copy_tree(target: Path) -> None:
    """Copy what git tracks or would track, and the compiled extension."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    extensions = [str(path.relative_to(ROOT)) for path in ROOT.glob("expface_kernels/_C*")]
    for name in [*listed.stdout.splitlines(), *extensions]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: tuple[str, ...], interpreted: bool) -> tuple[int, str]:
    """Return pytest's exit status, or −1 after SECONDS, and the end of what it printed."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    command += ["-k", "triton"] if interpreted else []
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, "no answer in time"
    return done.returncode, done.stdout[-2000:]


def build(tree: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, capture_output=True, check=True, env=os.environ | {"PYTHONPATH": str(tree)},
    )  # fmt: skip


def attempt(mutation: Mutation, tree: Path) -> Outcome:
    """Make the mutation in `tree`, run its tests, and take it back."""
    start, path = time.monotonic(), tree / mutation.file
    right = path.read_text()
    compiled = {p: p.read_bytes() for p in tree.glob("expface_kernels/_C*")} if mutation.compiled else {}
    path.write_text(right.replace(mutation.old, mutation.new))
    try:
        if mutation.compiled:
            build(tree)
        status, _ = run_tests(tree, mutation.tests, mutation.interpreted)
    finally:
        path.write_text(right)
        for extension, content in compiled.items():
            extension.write_bytes(content)
    verdict = {0: "SURVIVED", 1: "caught", 2: "caught", -1: "caught: hung"}.get(
        status, f"pytest said {status}"
    )
    return Outcome(mutation, verdict, time.monotonic() - start)


@contextmanager
def trees(count: int) -> Iterator[queue.Queue[Path]]:
    """Lend out `count` copies of the working tree."""
    with tempfile.TemporaryDirectory() as folder:
        free: queue.Queue[Path] = queue.Queue()
        for i in range(count):
            tree = Path(folder) / str(i)
            copy_tree(tree)
            free.put(tree)
        yield free


def baseline(mutations: list[Mutation], tree: Path) -> list[str]:
    """Return what is red without any mutation."""
    red = []
    for interpreted in (False, True):
        files = {name for m in mutations if m.interpreted == interpreted for name in m.tests}
        if files and (found := run_tests(tree, tuple(sorted(files)), interpreted))[0] not in (0, -1):
            red.append(f"red without a mutation: {found[1]}")
    return red


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.mutations")
    parser.add_argument("--list", action="store_true", help="print the mutations and make none")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="those whose name or file has one of the words"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    options = parser.parse_args(argv)
    words = options.only or [""]
    chosen = [m for m in read() if any(word in f"{m.name} {m.file}" for word in words)]
    if options.list:
        print("\n".join(f"{m.file}: {m.name}" for m in chosen))
        return 0
    with trees(options.jobs) as free, ThreadPoolExecutor(options.jobs) as pool:

        def borrowed(mutation: Mutation) -> Outcome:
            tree = free.get()
            try:
                return attempt(mutation, tree)
            finally:
                free.put(tree)

        outcomes = []
        for outcome in pool.map(borrowed, chosen):
            where = f"{outcome.mutation.file}: {outcome.mutation.name}"
            print(f"{outcome.verdict:13} {outcome.seconds:5.1f} s  {where}", flush=True)
            outcomes.append(outcome)
        tree = free.get()
        red = baseline(chosen, tree)
    survived = [o for o in outcomes if not o.verdict.startswith("caught")]
    print("\n".join(red))
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} mutations caught")
    return 1 if survived or red else 0


if __name__ == "__main__":
    sys.exit(main())
