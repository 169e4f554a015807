"""``pytest bench --benchmark-only``: a group a case, a test a provider (needs the extra ``bench``).

Read ``extra_info`` (``--benchmark-json``): providers interleaved round by round, median and 20/80 %
quantiles, error against float64. The columns of pytest-benchmark are one more call of each provider, in turn.
Sizes are tiny unless FASTSLOTS_BENCH_FULL=1 asks for the preset's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import TYPE_CHECKING

import pytest

from fastslots.bench.case import Options
from fastslots.bench.cases import CASES
from fastslots.bench.reporting.rows import Row
from fastslots.bench.run import measure

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

FULL = os.environ.get("FASTSLOTS_BENCH_FULL") == "1"
COMPILED = "compiled|autotune"  # a minute of compilation each: `fastslots bench` has them
REPORTED = ("status", "reason", "clock", "rounds", "time", "time_q20", "time_q80", "ratio", "error", "gflops_per_s")


def options(case: str) -> Options:
    preset = "sprites" if case == "jacobian" else "clevr6"
    return Options(preset, tiny=not FULL, rounds=3, memory=False, skip=COMPILED)


@functools.cache
def rows(case: str) -> dict[str, Row]:
    return {row.provider: row for row in measure(case, options(case))}


def pairs() -> list[tuple[str, str]]:
    sizes = {case: dataclasses.replace(options(case), tiny=True) for case in CASES}
    return [(case, name) for case, o in sizes.items() for name in CASES[case](o).providers if o.wants(name)]


@pytest.mark.parametrize(("case", "provider"), pairs())
def test_provider(benchmark: BenchmarkFixture, case: str, provider: str) -> None:
    row = rows(case)[provider]
    assert row.status != "wrong", row.reason
    benchmark.group = case
    benchmark.extra_info.update({name: getattr(row, name) for name in REPORTED})
    if row.status == "cannot":
        pytest.skip(row.reason)
    run = CASES[case](options(case)).providers[provider].built(options(case))
    benchmark.pedantic(run, rounds=1, warmup_rounds=1)
