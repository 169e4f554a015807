"""Whether what the README tells a stranger to install can be installed: resolved from the public index, as metadata.

    python .ci/resolve.py        needs pip, uv and the index; exit code 1 where something doesn't resolve;
                                 where the index can't be reached it says NOT CHECKED

Nothing that this machine's pip has been told (pip.conf, local wheels, other indexes, constraints) is asked, for a
stranger's pip has been told nothing. pip resolves the README's own commands for the Python that runs this. uv resolves
for the Pythons that are not here (pip takes the markers of the one that runs it), and every extra: the tested set, the
newest releases, and the lowest that pyproject.toml allows.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|dns error|Failed to fetch", re.I
)
STRANGER = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
STRANGER |= {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
if "PIP_CERT" in os.environ:  # how the index is reached, not what it holds
    STRANGER["PIP_CERT"] = os.environ["PIP_CERT"]

Check = tuple[str, list[str]]  # what is resolved, and the command


def readme_commands() -> list[Check]:
    """Every `pip install -c constraints.txt ...` that the README prints, made dry."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    printed = [found for block in blocks for found in re.findall(r"pip install (-c constraints\.txt [^&\n]*)", block)]
    if len(printed) < 2:
        raise SystemExit("README.md prints fewer than two `pip install -c constraints.txt` commands")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    # An index without separate metadata is asked for the ends of wheels, not for gigabytes; no C++ is compiled.
    pip += ["--use-feature=fast-deps", "--config-settings=wheel.cmake=false"]
    return [(f"pip install {words.strip()}", pip + words.replace("'", "").split()) for words in printed]


def other_pythons() -> list[Check]:
    """Each Python that pyproject.toml names, on both processors that have wheels of everything."""
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python", sys.executable]
    uv += ["--only-binary", ":all:", "--output-file", os.devnull]
    sets = {
        "tested set, all extras": ["-c", "constraints.txt", "--all-extras"],
        "newest releases, all extras": ["--all-extras"],
        "lowest releases": ["--resolution", "lowest-direct"],
    }
    checks = []
    for python in pythons:
        for name, words in sets.items():
            platform = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
            if name.startswith("lowest") and python != pythons[0]:
                continue  # the oldest releases have no wheels for newer Pythons
            checks.append((f"Python {python}, {name}", [*uv, *platform, *words, "pyproject.toml"]))
        arm = ["--python-version", python, "--python-platform", "aarch64-manylinux_2_28"]
        words = ["-c", "constraints.txt", "--extra", "test"]
        checks.append((f"Python {python} on AArch64, tested set, test", [*uv, *arm, *words, "pyproject.toml"]))
    return checks


def run(check: Check) -> str:
    """'' where it resolves, else what the resolver says."""
    name, command = check
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=STRANGER, capture_output=True, text=True)
    said = "" if done.returncode == 0 else (done.stderr or done.stdout or f"exit code {done.returncode}").strip()
    print(f"{'resolves' if not said else 'FAILS   '} {time.monotonic() - start:5.1f} s  {name}", flush=True)
    return said


def main() -> int:
    checks = readme_commands() + other_pythons()
    with ThreadPoolExecutor(2) as pool:
        failed = [(check, said) for check, said in zip(checks, pool.map(run, checks), strict=True) if said]
    for (name, command), said in failed:
        print(f"\n{name}\n$ {' '.join(command)}\n{said[-3000:]}", file=sys.stderr)
    wrong = [name for (name, _), said in failed if not UNREACHABLE.search(said)]
    if len(wrong) < len(failed):  # a machine without a network proves nothing about the packages
        print("\nNOT CHECKED: the package index can't be reached from here (see above)", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
