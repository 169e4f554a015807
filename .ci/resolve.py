"""Whether what the README tells a stranger to install can be installed: resolved from the public index, as metadata.

    python .ci/resolve.py        needs pip, uv and the index; exit code 1 where something doesn't resolve

Where the index can't be reached nothing can be said about packages: it prints NOT CHECKED, in a frame, and ends with 0.
It asks for one small package first. Where that is there, whatever fails afterwards is a failure; for a connection that
breaks off it tries once more, and then asks for the small package again.

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
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BROKEN_OFF = re.compile(r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|dns error|Failed to fetch", re.I)
STRANGER = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
STRANGER |= {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
STRANGER |= {"PIP_DEFAULT_TIMEOUT": "120", "UV_HTTP_TIMEOUT": "120"}  # a busy machine's, rather than a far index's
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


def said_by(command: list[str]) -> str:
    """What a command that fails says; '' of one that does not."""
    done = subprocess.run(command, cwd=ROOT, env=STRANGER, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr or done.stdout or f"exit code {done.returncode}").strip()


def index_is_silent() -> str:
    """Why not even one small package can be asked for; '' where it can."""
    ask = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--retries", "2"]
    with tempfile.TemporaryDirectory() as folder:
        return said_by([*ask, "--dest", folder, "iniconfig"])


def run(check: Check) -> str:
    """'' where it resolves, else what the resolver says."""
    name, command = check
    start = time.monotonic()
    said = said_by(command)
    if BROKEN_OFF.search(said):
        said = said_by(command)
    print(f"{'resolves' if not said else 'FAILS   '} {time.monotonic() - start:5.1f} s  {name}", flush=True)
    return said


def not_checked(why: str) -> int:
    text = "NOT CHECKED: whether the packages resolve, for the package index can't be reached from here"
    print("\n".join(["!" * len(text), text, "!" * len(text), why[-1000:]]), file=sys.stderr)
    return 0


def main() -> int:
    if why := index_is_silent():
        return not_checked(why)
    checks = readme_commands() + other_pythons()
    with ThreadPoolExecutor(2) as pool:
        failed = [(check, said) for check, said in zip(checks, pool.map(run, checks), strict=True) if said]
    for (name, command), said in failed:
        print(f"\n{name}\n$ {' '.join(command)}\n{said[-3000:]}", file=sys.stderr)
    print(f"{len(checks) - len(failed)} of {len(checks)} resolve", file=sys.stderr)
    if failed and all(BROKEN_OFF.search(said) for _, said in failed) and (why := index_is_silent()):
        return not_checked(why)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
