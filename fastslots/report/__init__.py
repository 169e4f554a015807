"""A run as one HTML page: ``page.py`` assembles it, from facts (``data.py``) and pictures (``explorer.py``)."""

from fastslots.report.facts import run_facts
from fastslots.report.page import render

__all__ = ["render", "run_facts"]
