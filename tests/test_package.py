"""The package as a whole: what importing it costs, what it exports, who may import whom."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import expface_kernels
from expface_kernels import backends, reference

PACKAGE = Path(expface_kernels.__file__).parent
ROOT = PACKAGE.parent

# Each module may import those with a smaller number, and files of one folder each other. A new module gets a
# line here.
LAYERS = {
    "margins": 0,
    "stats": 0,
    "margin_spec": 1,
    "checks": 1,
    "commands": 1,
    "reference": 1,
    "backends": 2,
    "ops": 3,
    "machine": 3,
    "options": 3,
    "distributed": 4,
    "analysis": 5,
    "pipeline": 5,
    "functional": 6,
    "partial_fc": 5,
    "workshop": 5,
    "testing": 7,
    "plan": 7,
    "heads": 7,
    "": 8,  # the package's own __init__
    "checkpoint": 9,
    "compat": 9,
    "cli": 9,
    "__main__": 10,
}
# Narrower than their layer: nothing may reach a margin or the truth that they would have to follow.
ONLY = {"margins": set(), "stats": set(), "reference": {"margins", "stats"}}


def in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing_heavy_and_leaves_torch_and_the_gpu_alone() -> None:
    state = "(torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item())"
    found = in_a_new_process(
        f"import sys, torch; torch.manual_seed(5); before = {state}\n"
        "import expface_kernels\n"
        "print([name for name in ('triton', 'expface_kernels._C', 'torch._dynamo') if name in sys.modules],"
        f" torch.cuda.is_initialized(), before == {state})"
    )
    assert found == "[] False True"


def test_everything_exported_exists_and_is_listed_in_order() -> None:
    assert expface_kernels.__all__ == sorted(expface_kernels.__all__)
    for name in expface_kernels.__all__:
        assert getattr(expface_kernels, name) is not None
    public = {
        name
        for name, value in vars(expface_kernels).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(expface_kernels.__all__)


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert re.search(r'expface_kernels = \[[^]]*"py\.typed"', (ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_one_of_pyproject() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert expface_kernels.__version__ == declared[1]


def test_every_package_is_listed_for_the_build() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for init in PACKAGE.rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in text, name


def sources() -> Iterator[tuple[str, Path]]:
    """(dotted name inside the package, file) of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, also inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """The top-level modules of the package that a file imports from."""
    ours = (name.split(".")[1:] for name in imported(path) if name.split(".")[0] == "expface_kernels")
    return {parts[0] for parts in ours if parts and parts[0] in LAYERS}


@pytest.mark.parametrize(
    ("name", "path"), list(sources()), ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_imports_point_one_way(name: str, path: Path) -> None:
    room = name.split(".")[0]
    assert room in LAYERS, f"{name}: say in LAYERS what it may import"
    found = rooms_imported(path)
    is_folder = (PACKAGE / room).is_dir() and room != ""
    for other in found - {room} if is_folder else found:
        assert LAYERS[other] < LAYERS[room], f"{name} imports {other}"
    outside = {other.split(".")[0] for other in imported(path)} & {"bench", "lab", "tests", "examples"}
    assert not outside, f"{name} imports {outside}"
    if name in ONLY:
        assert found <= ONLY[name], f"{name} imports {found - ONLY[name]}"


def public_objects() -> Iterator[tuple[str, object]]:
    """Exported names, the two public functions of modules, and every public method defined in our classes."""
    yield "reference.margin_cross_entropy", reference.margin_cross_entropy
    yield "backends.available", backends.available
    for name in expface_kernels.__all__:
        value = getattr(expface_kernels, name)
        yield name, value
        if inspect.isclass(value):
            for method, member in vars(value).items():
                if not method.startswith("_") and (
                    inspect.isfunction(member) or isinstance(member, property)
                ):
                    yield f"{name}.{method}", member


@pytest.mark.parametrize(
    ("name", "value"), list(public_objects()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_everything_public_is_documented(name: str, value: object) -> None:
    # `extra_repr` is torch's, and documented there.
    if name != "MarginSoftmaxHead.extra_repr":
        assert value.__doc__, name
        assert value.__doc__.strip(), name


@pytest.mark.parametrize(
    "path", [path for _, path in sources()], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
