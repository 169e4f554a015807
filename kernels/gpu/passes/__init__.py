"""What stands between the products of the encoder and of the output head, each as one pass over rows [N, D]::

    bias_gelu   h = GELU(u + b)                       du = dh ∘ GELU'(u + b),   db = Σ_rows du
    bias_norm   y = n                                 dx of the norm,           db = Σ_rows dx
                with n = (x + b − mean) / σ of each row
    row_norm    y = γ ∘ n + β                         dx,  dγ = Σ_rows dy ∘ n,  dβ = Σ_rows dy
                with n = (x − mean) / σ

and the joint norm, which takes two. Memory binds them: a forward reads and writes each number once, a backward reads
two and writes one. Arithmetic is fp32 whatever rows are stored in. Sums over rows are fp32 as well: a program sums a
fixed range of rows, torch the programs' sums, so the same call gives the same bits.
"""

from __future__ import annotations

COLUMNS = 64
"""Of a chunk of a row: in 16 bits eight threads read 16 bytes each."""
PROGRAMS = 1056
"""Of a backward: eight blocks for each of an H100's multiprocessors."""
