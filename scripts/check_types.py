"""Checks the types of fastslots, kernels and bench together: `python scripts/check_types.py`, a few seconds when warm.

kernels and bench are installed as fastslots.kernels and fastslots.bench. mypy follows folders alone, so it is shown a
tree of links that lies as an installation does. The settings are in pyproject.toml; other arguments go to mypy.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".mypy_cache"
"""Also holds the tree of links: mypy's cache is good for files at the same paths alone."""


def link_tree(top: Path) -> Path:
    """Links in ``top`` to all of the package, as it would be installed; those of files that are gone are removed."""
    package = top / "fastslots"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in [*(ROOT / "fastslots").iterdir(), ROOT / "kernels", ROOT / "bench"]}
    for link in package.iterdir():
        if wanted.get(link.name) != link.readlink():
            link.unlink()
    for name, path in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(path)
    return top


def main(arguments: list[str]) -> int:
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE)]
    command = [sys.executable, "-m", "mypy", *settings, "-p", "fastslots", *arguments]
    return subprocess.run(command, cwd=link_tree(CACHE / "tree"), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
