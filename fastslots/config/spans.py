"""Lengths of a run's schedules: a number of steps, or a share of the run."""

from __future__ import annotations

from fastslots.errors import UserError

Span = int | str
"""Steps (an int), or a share of ``steps`` as text that ends in a percent sign ("8%")."""


def checked_span(name: str, value: object) -> Span:
    """``value`` as a ``Span`` in its plainest form. UserError that names the field and what is expected.

    A share needs its sign, so that 1 is one step, "1%" a hundredth, and 0.01 neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
        try:
            share = float(text.removesuffix("%")) if text.endswith("%") else -1.0
        except ValueError:
            share = -1.0
        if 0 <= share <= 100:
            return f"{share:.12g}%"
    raise UserError(f"{name} must be whole steps from 0 on, or a share of the run such as 8%, got {value!r}")


def in_steps(span: Span, steps: int) -> int:
    """A span's steps in a run of ``steps``; a share is rounded to whole ones."""
    return span if isinstance(span, int) else round(float(span.removesuffix("%")) / 100 * steps)
