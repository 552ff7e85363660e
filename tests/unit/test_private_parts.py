"""Ray's private parts are used in one file only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = ROOT / "rayllm/engine/ray_private.py"
PRIVATE = re.compile(
    r"^(ray|serve)\b.*\._[a-z]"  # ray._private, serve.context._get_global_client
    r"|^ray\.(autoscaler|core|experimental|util\.client)\b"
    r"|^ray\.get_runtime_context\(\)\.worker\b"
)


def private_parts(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module)):
                names = [f"{module}.{alias.name}" for alias in node.names]
            case ast.Attribute():
                names = [ast.unparse(node)]
            case _:
                continue
        yield from (name for name in names if PRIVATE.match(name))


def test_one_file_uses_them():
    assert len(set(private_parts(ALLOWED))) > 8, "they would be found"
    files = [file for folder in ("rayllm", "deployments", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert {
        file.name: list(private_parts(file)) for file in files if file != ALLOWED and any(private_parts(file))
    } == {}
