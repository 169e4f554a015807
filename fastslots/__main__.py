"""``python -m fastslots`` is the same as ``fastslots``."""

from fastslots.cli import main

raise SystemExit(main())
