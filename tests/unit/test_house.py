"""The house: packages import downward only, modules in no circle, and policy without torch or Ray."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "rayllm": ROOT / "rayllm",
    "deployments": ROOT / "deployments",
    "rayllm_kernels": ROOT / "kernels/rayllm_kernels",
}
FLOORS = (
    ("rayllm_kernels",),
    ("rayllm",),  # the vocabulary: modules that lie in no package
    ("rayllm.messages", "rayllm.models"),
    ("rayllm.scheduling", "rayllm.checkpoint"),
    ("rayllm.runner",),
    ("rayllm.engine",),
    ("rayllm.frontend",),
    ("deployments",),
    ("deployments.batch_jobs",),
    ("rayllm.__main__",),
)
"""A module imports from its own package and from floors below it."""
LIGHT = ("rayllm", "rayllm.messages", "rayllm.scheduling")
"""Packages that load neither torch nor Ray."""
LIGHT_MODULES = ("rayllm.models.config_json", "rayllm.checkpoint.sources")
"""Modules of other packages that do not load them either, since the driver reads models' configurations with them."""
MAX_LINES = 400
MAX_SHARE = 0.25


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = (name, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def package_of(module: str) -> str:
    """The package that stands in `FLOORS`."""
    named = {package for floor in FLOORS for package in floor}
    while module not in named:
        module = module.rpartition(".")[0]
    return module


def floor_of(module: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if package_of(module) in floor)


def imports_of(module: str, *, at_load: bool) -> Iterator[str]:
    """Our own modules that it imports: with `at_load` those it needs to be loaded, else also those in functions and for
    the type checker."""
    tree = ast.parse(MODULES[module].read_text())
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            target = name if name in MODULES else name.rpartition(".")[0]
            if target in MODULES:
                yield target


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"rayllm"}))  # which names what users import
def test_imports_point_downward(module: str) -> None:
    for target in imports_of(module, at_load=False):
        is_own = package_of(target) == package_of(module)
        assert is_own or floor_of(target) < floor_of(module), f"{module} imports {target}"


def test_no_circle() -> None:
    graph = {module: set(imports_of(module, at_load=True)) - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()


def test_light_packages_load_neither_torch_nor_ray() -> None:
    light = [module for module in MODULES if package_of(module) in LIGHT or module in LIGHT_MODULES]
    for module in light:
        assert not re.search(r"^ *(from|import) (torch|ray)\b", MODULES[module].read_text(), re.MULTILINE), module
    code = f"import sys, {', '.join(light)}; print(*{{'torch', 'ray'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not done.stdout.split()


def test_sizes() -> None:
    """No file needs scrolling to be understood, and no package is the whole."""
    lines = {module: len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert not {module: number for module, number in lines.items() if number > MAX_LINES}
    packages: dict[str, int] = {}
    for module, number in lines.items():
        packages[package_of(module)] = packages.get(package_of(module), 0) + number
    assert not {package: n for package, n in packages.items() if n > MAX_SHARE * sum(lines.values())}
