"""Where decoded and fetched data are kept."""

from __future__ import annotations

import os
from pathlib import Path

from fastslots.errors import UserError


def cache_root() -> Path:
    """``$FASTSLOTS_CACHE``, or ~/.cache/fastslots where that is not set. UserError where there is no home folder."""
    try:
        return Path(os.environ.get("FASTSLOTS_CACHE") or "~/.cache/fastslots").expanduser()
    except RuntimeError:
        raise UserError("there is no home folder for ~/.cache/fastslots: set FASTSLOTS_CACHE or HOME") from None
