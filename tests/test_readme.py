"""The README's Python blocks run, one after another; its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fastslots.cli import build_parser

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (2, 12, 4096, 43) and names["slot_map"].shape == (1, 1024, 4)


def test_commands_parse():
    commands = re.findall(r"fastslots (?:train|eval|data|report)[^\n&#]*", "\n".join(blocks("bash")))
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])
