"""A trained decoder as one file that PyTorch loads without fastslots' model code.

    python examples/export_decoder.py runs/sprites-mini-1 --out decoder.pt2

The file is a torch.export program, slots [1, K, D] -> picture [1, 3, R, R] and slot map. The reference backend is
traced, so that it runs where fastslots' kernels are not installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.models import SlotVAE


class PlainDecoder(nn.Module):
    """The decoder with the backend named, so that what is exported holds PyTorch's own operators alone."""

    def __init__(self, model: SlotVAE):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder(slots, backend="reference")


@torch.no_grad()
def main(run: Path, out: Path) -> float:
    model = SlotVAE.from_run(run)
    slots = torch.randn(1, model.config.num_slots, model.config.slot_dim)
    torch.export.save(torch.export.export(PlainDecoder(model).eval(), (slots,)), out)
    loaded = torch.export.load(out).module()
    difference = (loaded(slots)[0] - model.decoder(slots)[0]).abs().max().item()
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, differs from the model by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("decoder.pt2"))
    args = parser.parse_args()
    main(args.run, args.out)
