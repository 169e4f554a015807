"""``python -m fastslots`` and the command ``fastslots``: says in one line what is wrong before a command can."""

import sys


def start() -> int:
    """Run the command line -> its exit code; 2 where this Python is too old."""
    if sys.version_info < (3, 10):  # noqa: UP036 - pip refuses to install there, but a checkout runs without pip
        here = "{}.{}.{}".format(*sys.version_info[:3])
        print(
            f"fastslots needs Python 3.10 or newer, and {sys.executable} is {here}: name a newer one", file=sys.stderr
        )
        return 2
    from fastslots.cli import main

    return main()


if __name__ == "__main__":
    raise SystemExit(start())
