"""A case a file, named by what it times."""

from __future__ import annotations

from collections.abc import Callable

from fastslots.bench.case import Case, Options
from fastslots.bench.cases.decoder import layer_case
from fastslots.bench.cases.jacobian import jacobian_case
from fastslots.bench.cases.layer import block_case
from fastslots.bench.cases.loader import loader_case
from fastslots.bench.cases.op import op_case
from fastslots.bench.cases.slots import slots_case
from fastslots.bench.cases.step import step_case
from fastslots.bench.cases.token_maps import map_case

CASES: dict[str, Callable[[Options], Case]] = {
    "op": op_case,
    "block": block_case,
    "layer": layer_case,
    "step": step_case,
    "jacobian": jacobian_case,
    "loader": loader_case,
    "map": map_case,
    "slots": slots_case,
}
"""By their names on the command line, where a decoder's step is ``layer`` and one of its layers ``block``."""
