"""``python -m fastslots`` is the same as ``fastslots``."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - pip refuses to install there, but a checkout runs without pip
    here = "{}.{}.{}".format(*sys.version_info[:3])
    print(f"fastslots needs Python 3.10 or newer, and {sys.executable} is {here}: name a newer one", file=sys.stderr)
    raise SystemExit(2)

from fastslots.cli import main

raise SystemExit(main())
