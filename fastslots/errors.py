"""The one error type that a user, rather than a programmer, causes."""

from __future__ import annotations

import sys


class UserError(ValueError):
    """Bad input or usage. The message is one line that names the culprit (file, record, flag) and the mend.

    The command line prints it without a traceback and exits with code 2; library callers may catch ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing: for a message of one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch or a kernel asked for memory and got none."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "bad allocation")  # PyTorch's own types are few
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def print_error(error: UserError) -> None:
    """On stderr, as every command says it: one line."""
    print(f"fastslots: error: {' '.join(str(error).split())}", file=sys.stderr)
