"""scripts/step_parts.py, on samples as perf prints them."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/step_parts.py"
NAMES = "fastslots::avx512::"
SAMPLES = f"""
\t          172a15 {NAMES}product_block<float, false, 2, 11>
\t          14d80d {NAMES}product<float, false>
\t          18acae {NAMES}winograd_convolve<float, 5>(float const*)
\t          191ba5 {NAMES}Encoder<float>::forward_image

\tffffffff81000c82 asm_exc_page_fault
\t          191e66 {NAMES}Encoder<float>::forward_image

\t          1a0000 {NAMES}gelu<float>
\t          1a0001 {NAMES}forward_layer<float>

\t          1b0000 at::native::add
"""


def test_samples_are_told_apart_by_their_stacks():
    script = runpy.run_path(str(SCRIPT))
    stacks = script["read_stacks"](SAMPLES)
    assert [script["part_of"](stack) for stack in stacks] == [
        ("encoder: Winograd convolutions", "products"),
        ("encoder: token MLP, norms, GELU", "pages and system"),
        ("decoder", "other"),
        ("PyTorch and Python", "other"),
    ]
    assert "| decoder | 25.0 | 0.0 | 0.0 |" in script["table"](stacks)
