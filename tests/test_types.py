"""Types of the whole tree: mypy in its strict form, and no function of the Triton files left without them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_whole_tree_is_strictly_typed():
    pytest.importorskip("mypy")
    command = [sys.executable, ROOT / "scripts/check_types.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_launchers_are_typed_where_kernels_are_not():
    """mypy lets functions without types pass in these files, for the kernels' sake: this looks at the others."""
    paths = sorted((ROOT / "kernels/gpu").glob("*.py"))
    functions = [(p, f) for p in paths for f in ast.walk(ast.parse(p.read_text())) if isinstance(f, ast.FunctionDef)]
    assert sum(is_kernel(f) for _, f in functions) > 10
    for path, function in functions:
        if not is_kernel(function):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
            returns = function.returns is not None or function.name == "__init__"
            assert returns and not bare, f"{path.name}: {function.name} {bare}"
