"""``python -m fastslots`` and the command ``fastslots``: says in one line what is wrong before a command can."""

import sys


def start() -> int:
    """Run the command line -> its exit code; 2 where this Python is too old, or a package can't be imported."""
    if sys.version_info < (3, 10):  # noqa: UP036 - pip refuses to install there, but a checkout runs without pip
        here = "{}.{}.{}".format(*sys.version_info[:3])
        print(
            f"fastslots needs Python 3.10 or newer, and {sys.executable} is {here}: name a newer one", file=sys.stderr
        )
        return 2
    try:
        from fastslots.cli import main
    except ImportError as error:
        if (error.name or "fastslots").startswith("fastslots"):  # ours: a bug, whose place is to be seen
            raise
        mend = "pip install fastslots (in a checkout: pip install -c constraints.txt .) brings what it needs"
        print(f"fastslots can't start with {sys.executable}: {error}: {mend}", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    raise SystemExit(start())
