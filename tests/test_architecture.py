"""Imports point one way, the pure core stays pure, and the package's root is imported by nobody inside."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tilepipe

ROOT = Path(tilepipe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

PURE = {
    "errors",
    "window",
    "geometry.derivation",
    "geometry.steps",
    "geometry.network",
    "geometry.residues",
    "geometry.sizes",
    "axis",
    "projection",
    "plan",
    "planner",
}
"""The core: plain values and functions."""
HEAVY = {"torch", "dask", "distributed", "rasterio", "zarr", "numba"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "tilepipe"


def imports_of(path: Path, everywhere: bool = True) -> set[str]:
    """Full names of what a file imports; without `everywhere`, only when it is loaded."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # "from package import module" is an import of the module, "from module import name" one of the module.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("tilepipe.") in MODULES}
            found |= modules or {node.module}
        elif isinstance(node, ast.ImportFrom):
            found.add("a relative import")
    return found


MODULES = {module_name(path): path for path in FILES}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_the_package_root(name: str) -> None:
    if name == "tilepipe":
        return
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "tilepipe" or all(f"{alias.name}" in MODULES for alias in node.names)
            assert node.level == 0
        if isinstance(node, ast.Import):
            assert all(alias.name != "tilepipe" for alias in node.names)


def test_imports_form_no_cycle() -> None:
    graph = {}
    for name, path in MODULES.items():
        if name == "tilepipe":
            continue
        graph[name] = {full.removeprefix("tilepipe.") for full in imports_of(path)} & (
            MODULES.keys() - {name, "tilepipe"}
        )
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("errors") < order.index("geometry.network") < order.index("planner") < order.index("pipeline")
    assert order.index("pipeline") < order.index("cli.jobs")


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_core_knows_no_library_of_pixels_or_tasks(name: str) -> None:
    reached, waiting = set(), {name}
    while waiting:
        current = waiting.pop()
        reached.add(current)
        names = imports_of(MODULES[current])
        assert not {full.split(".")[0] for full in names} & HEAVY, current
        waiting |= {full.removeprefix("tilepipe.") for full in names} & MODULES.keys() - reached


def test_the_scheduler_knows_nothing_of_rasters_and_networks() -> None:
    ours = {name for name in imports_of(MODULES["schedule"]) if name.startswith("tilepipe.")}
    assert {name.split(".")[1] for name in ours} == {"allocator", "errors"}
