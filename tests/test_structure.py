"""Imports go one way, and importing the package needs neither a GPU nor optional packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastslots

ROOT = Path(fastslots.__file__).parent
# each layer may import those before it
LAYERS = ("errors", "kernels", "ops", "nn", "models", "interop", "metrics", "data", "report", "train", "bench", "cli")
ALWAYS = {"errors"}
FORBIDDEN = {
    "data": {"models", "metrics", "ops", "nn", "kernels"},
    "metrics": {"data"},
    # the C++ and Triton modules are reached through ops.backends alone
    **{layer: {"kernels"} for layer in ("nn", "models", "train")},
}


def imported_layers(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastslots."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "fastslots":
            names |= {alias.name for alias in node.names} & {*LAYERS, "testing"}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastslots.")}
    return names


def test_imports_go_one_way():
    for number, layer in enumerate(LAYERS):
        files = [ROOT / f"{layer}.py"] if (ROOT / f"{layer}.py").exists() else sorted((ROOT / layer).glob("*.py"))
        allowed = set(LAYERS[: number + 1]) - FORBIDDEN.get(layer, set())
        for path in files:
            checks_itself = {"testing"} if layer in ("cli", "bench") else set()
            wrong = imported_layers(path) - allowed - checks_itself
            assert not wrong, f"{path} imports {sorted(wrong)}"


def test_importing_needs_no_optional_or_heavy_package():
    code = (
        "import sys, fastslots.ops, fastslots.models, fastslots.data, fastslots.cli\n"
        "optional = ('triton', 'h5py', 'tensorboard', 'scipy', 'rich', 'flask', 'fastslots._cpu')\n"
        "print([m for m in optional if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent.parent
    )
    assert out.stdout.strip() == "[]"


def test_one_version():
    from importlib.metadata import version

    assert fastslots.__version__ == version("fastslots")
