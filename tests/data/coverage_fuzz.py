"""Coverage-guided fuzzing of the readers of ``test_fuzz``, by hand: it needs atheris, which few platforms have.

    pip install atheris && python tests/data/coverage_fuzz.py SECONDS [READER ...]

Each reader starts from its seed file and runs in a process of its own. Ends with code 1 where a case crashed, hung
(20 s), or allocated over 512 MiB at once; libFuzzer leaves that case in the current folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["fastslots.data", "fastslots.models.weights", "fastslots.runs", "fastslots.train", "zipfile"]
):
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from test_fuzz import TARGETS, run_case


def fuzz(name: str, seconds: str) -> None:
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as folder:
        (Path(corpus) / "seed").write_bytes(target.seed())

        def case(data: bytes) -> None:
            end = run_case(target, data, Path(folder))
            if end not in ("read", "refused"):
                raise RuntimeError(f"{name}: {end}")

        limits = ["-malloc_limit_mb=512", "-rss_limit_mb=4096", "-max_len=65536", "-handle_alrm=0"]
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-print_final_stats=1", *limits, corpus], case)
        atheris.Fuzz()


def main(seconds: str, names: list[str]) -> int:
    wrong = 0
    for name in names or TARGETS:
        run = subprocess.run([sys.executable, __file__, "--one", seconds, name], capture_output=True, text=True)
        cases = re.search(r"number_of_executed_units: (\d+)", run.stderr)
        covered = re.findall(r"cov: (\d+)", run.stderr)
        end = "" if run.returncode == 0 else f"  exit {run.returncode}\n{run.stderr[-3000:]}"
        print(
            f"{name:<24}{cases[1] if cases else '?':>9} cases, coverage {' to '.join(covered[:1] + covered[-1:])}{end}"
        )
        sys.stdout.flush()
        wrong += run.returncode != 0
    return int(wrong > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(sys.argv[3], sys.argv[2])
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
