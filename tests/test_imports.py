"""Imports point one way: between the packages, between the rooms of each (docs/house.md), and never in a circle."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "losses", "data")
OURS = ("trainer", *PACKAGES)


def module_name(path: Path) -> str:
    """Dotted name of a file; a package goes by its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def graph() -> dict[str, set[str]]:
    """Our modules, and which of ours each imports; a package counts only where nothing inside it was named."""
    found = {}
    for name, path in MODULES.items():
        named = {module for module in imported(path) if module in MODULES}
        inner = {module for module in named if any(other.startswith(f"{module}.") for other in named)}
        found[name] = named - inner - {name}
    return found


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in edges:
        if node not in number:
            visit(node)
    return found


def room(module: str) -> str:
    """The file or wing of a package that a module is, or is in."""
    return ".".join(module.split(".")[:2])


def written_order(package: str) -> dict[str, int]:
    """Line of docs/house.md on which each room of a package stands."""
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```order {package}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line.split() for line in block.splitlines()]
    order = {f"{package}.{name.rstrip('/')}": storey for storey, line in enumerate(lines) for name in line}
    assert len(order) == sum(map(len, lines)), "a room stands on two lines"
    for name in (name for line in lines for name in line):
        path = ROOT / package / name
        assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").is_file(), f"{package}/{name} is gone"
    return order


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_no_sibling(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 3
    forbidden = {"trainer", "tests", "benchmarks", "deepspeed", *PACKAGES} - {package}
    for path in files:
        assert not {name.split(".")[0] for name in imported(path)} & forbidden, path


def test_trainer_imports_no_tests():
    for path in (ROOT / "trainer").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"tests", "benchmarks"}, path


@pytest.mark.parametrize("package", ["data", "models", "trainer"])
def test_rooms_import_only_what_stands_above_them(package):
    order = written_order(package)
    edges = graph()
    rooms = {room(module) for module in edges if module.startswith(f"{package}.")}
    assert rooms == set(order), "docs/house.md lists other rooms than there are"
    wrong = [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if room(module) in order and room(other) in order and room(module) != room(other)
        if order[room(other)] >= order[room(module)]
    ]
    assert not wrong


def test_no_circle_of_imports_between_files():
    assert circles(graph()) == []


def test_no_circle_of_imports_between_rooms():
    edges = {}
    for module, others in graph().items():
        edges.setdefault(room(module), set()).update(room(other) for other in others)
    assert circles({name: others - {name} for name, others in edges.items()}) == []


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": []}) == [["a", "b", "c"]]


def test_configuration_imports_no_torch():
    """What is wrong in a recipe is said before the seconds that torch takes."""
    code = "import sys, trainer.config.recipe, trainer.config.ds_config; print('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"


def test_loader_workers_import_no_compiler():
    """Which takes a second of each start, and hundreds of megabytes."""
    code = "import sys, data.dataset, data.sample; print({'torchvision', 'torch._dynamo'} & sys.modules.keys())"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"
