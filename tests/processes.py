"""Several processes of one run, as torchrun starts them."""

from __future__ import annotations

import socket
from pathlib import Path


def as_torchrun(commands, size: int, argv: list[str], folder: Path, cwd: str | Path = ".") -> list:
    """``size`` processes with the variables that torchrun sets; of process r stderr in err_r, stdout in out_r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    return [
        commands.start(
            argv, folder / f"err_{rank}", cwd, folder / f"out_{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **env
        )
        for rank in range(size)
    ]
