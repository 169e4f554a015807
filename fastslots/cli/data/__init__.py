"""fastslots data check | pack | generate | features | get"""

from fastslots.cli.data.commands import add_parser

__all__ = ["add_parser"]
