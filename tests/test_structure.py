"""Imports go one way, and importing the package needs neither a GPU nor optional packages."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import fastslots

ROOT = Path(fastslots.__file__).parent
ROOMS = """
    errors threads notices files records step_records capture
    kernels
    ops nn integrations
    config runs models interop
    metrics
    data features
    distributed
    report
    evaluation
    train
    sweep
    bench cli
"""
"""Each room imports rooms before it alone; ``FORBIDDEN`` names what it may not import all the same."""
ORDER = ROOMS.split()
FORBIDDEN = {
    "metrics": {"config"},
    "data": {"runs", "models", "metrics", "ops", "nn", "kernels", "interop"},
    # the C++ and Triton modules are reached through ops.backends alone
    **{room: {"kernels"} for room in ("nn", "models", "runs", "report", "evaluation", "train", "sweep")},
}
TESTING = {"cli", "bench"}
"""Rooms that check what they time, with the helpers of ``fastslots.testing``."""


def files(room: str) -> list[Path]:
    """Every file of a room, at every depth; kernels and bench may lie beside the package (an editable install)."""
    single = ROOT / f"{room}.py"
    folder = next((f for f in (ROOT / room, ROOT.parent / room) if f.is_dir()), ROOT / room)
    return [single] if single.exists() else sorted(folder.rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastslots."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "fastslots":
            names |= {alias.name for alias in node.names} & {*ORDER, "testing"}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastslots.")}
    return names


def test_imports_go_one_way():
    for number, room in enumerate(ORDER):
        allowed = set(ORDER[: number + 1]) - FORBIDDEN.get(room, set()) | ({"testing"} if room in TESTING else set())
        assert room == "records" or files(room), f"{room} has no files: mend the table"
        for path in files(room):
            wrong = imported_rooms(path) - allowed
            assert not wrong, f"{path} imports {sorted(wrong)}"


def modules() -> dict[str, Path]:
    """Name -> file of every module, kernels and bench among them wherever they lie."""
    names = {}
    for room in ORDER:
        for path in files(room):
            top = path.parent if path == ROOT / f"{room}.py" else next(p for p in path.parents if p.name == room).parent
            parts = ("fastslots", *path.relative_to(top).with_suffix("").parts)
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """Also those that a function imports when it is called, and those that a type checker alone reads."""
    names, pending = set(), [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {inner[name] if inner[name] in known else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return names & known.keys()


def test_no_two_modules_import_each_other():
    known = modules()
    assert "fastslots.train.loop" in known and "fastslots.kernels.cpu_backend" in known
    assert "fastslots.models.vae" in imported_modules(known["fastslots.models"], known)
    graph = {name: imported_modules(path, known) - {name} for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names a circle


def test_every_room_is_in_the_table():
    known = {*ORDER, "testing", "__init__", "__main__"}
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert rooms <= known, f"name {sorted(rooms - known)} in ROOMS"


def test_files_and_folders_stay_small():
    for room in ORDER:
        paths = [path for path in files(room) if path.name != "__init__.py"]
        for path in paths:
            assert len(path.read_text().splitlines()) <= MOST_LINES.get(path.name, 320), f"{path} is too long"
        for folder in {path.parent for path in paths}:
            count = sum(path.parent == folder for path in paths)
            assert count <= MOST_FILES.get(room, 12), f"{folder} holds {count} files"


MOST_LINES: dict[str, int] = {}
MOST_FILES: dict[str, int] = {}
"""What is not yet as small as the rest."""


def test_config_seldom_comes_back_to_a_room_that_it_had_left():
    """A part takes what it needs rather than the run's record: handed on whole, it would go to and fro."""
    path = Path(__file__).parents[1] / "scripts/follow.py"
    spec = importlib.util.spec_from_file_location("follow", path)
    follow = sys.modules["follow"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(follow)
    config, *others = follow.STARTS
    assert {"train", "data", "models"} <= set(follow.rooms(config))
    assert follow.returns(config) < 6 and follow.returns(config, by_file=True) < 10
    for start in others:
        assert follow.returns(start) < 3


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


def test_the_package_offers_its_main_names_and_imports_them_late():
    code = (
        "import sys, fastslots\n"
        "assert set(fastslots.__all__) <= set(dir(fastslots)) and 'torch' not in sys.modules\n"
        "from fastslots import SlotVAE, TrainConfig, fit, cross_attention, explain, interaction_penalty, __version__\n"
        "from fastslots import models, ops, train\n"
        "assert (SlotVAE, fit, cross_attention) == (models.SlotVAE, train.fit, ops.cross_attention)\n"
        "assert explain is ops.explain\n"
        "print(hasattr(fastslots, 'SlotVea'))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent.parent)
    assert out.stdout.strip() == "False"


def test_one_version():
    from importlib.metadata import version

    assert fastslots.__version__ == version("fastslots")
