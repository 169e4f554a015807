"""The one error type that a user, rather than a programmer, causes."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or usage. The message is one line that names the culprit (file, record, flag) and the mend.

    The command line prints it without a traceback and exits with code 2; library callers may catch ``ValueError``.
    """
