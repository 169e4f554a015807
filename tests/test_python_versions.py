"""Every Python that pyproject.toml allows has what the package takes from the standard library.

The suite runs on one Python. mypy knows which names and keywords each version of the standard library has; here it
looks at nothing else, so it needs none of the installed packages (their stubs may be for newer Pythons alone).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastslots", "kernels", "bench")
PYTHONS = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
CODES = ("attr-defined", "call-arg", "syntax")  # a name, a keyword, a form that this version lacks
PARENTHESISED = "Star unpack syntax"  # mypy takes x[(*a, b)], which every Python has, for x[*a, b]


def lacks(folder: Path, python: str) -> list[str]:
    """What the sources in ``folder`` ask of a Python that has it not, as mypy says it."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-site-packages",
        "--ignore-missing-imports",
        "--follow-imports=silent",
    ]
    command += ["--config-file=", "--cache-dir", str(folder / ".cache"), "--python-version", python, "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.endswith(tuple(f"[{code}]" for code in CODES))]
    return [line for line in said if PARENTHESISED not in line]


@pytest.mark.parametrize("python", [PYTHONS[0], PYTHONS[-1]])
def test_the_standard_library_has_what_is_taken(tmp_path, python):
    pytest.importorskip("mypy")
    package = tmp_path / "fastslots"
    package.mkdir()
    for path in [*(ROOT / "fastslots").iterdir(), ROOT / "kernels", ROOT / "bench"]:
        (package / path.name).symlink_to(path)
    (tmp_path / "newer.py").write_text("from datetime import UTC\nfrom typing import Self\n")
    (tmp_path / "removed.py").write_text("from ast import Num\n")
    said = lacks(tmp_path, python)
    planted = [line for line in said if line.startswith(("newer.py", "removed.py"))]
    assert len(planted) == (2 if python == "3.10" else 1), "mypy sees no difference between Pythons any more"
    assert said == planted


def test_the_oldest_python_reads_every_file():
    oldest = tuple(int(part) for part in PYTHONS[0].split("."))
    with pytest.raises(SyntaxError):
        ast.parse("try: pass\nexcept* OSError: pass", feature_version=oldest)
    for path in [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]:
        ast.parse(path.read_text(), str(path), feature_version=oldest)
