"""Short names for the sizes of a launch, by which ``cost`` counts."""

from __future__ import annotations

import math

from torch import Tensor

from ..gpu._pack import round_up
from ..gpu.launch import Launch


class Terms:
    """Short names for the sizes of a launch."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.args, self.consts, self.grid = launch, launch.args, launch.constexprs, launch.grid
        self.programs = math.prod(launch.grid)
        self.D, self.BL = self.consts.get("D", 0), self.consts.get("BLOCK_L", 0)  # 0: a kernel without rows or tiles
        self.W = round_up(self.D, self.consts["BLOCK_D"]) if self.D else 0

    def of(self, name: str) -> Tensor:
        tensor: Tensor = self.args[name]
        return tensor

    def number(self, name: str) -> int:
        return int(self.args[name])

    def size(self, *names: str) -> int:
        """Bytes of whole tensors."""
        return sum(t.numel() * t.element_size() for t in map(self.of, names))

    def element(self, name: str) -> int:
        return self.of(name).element_size()
