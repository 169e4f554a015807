"""Case ``loader``: images a second from a packed folder, uint8 on disk to fp32 [b, 3, R, R] in memory.

The published program makes a new iterator over a shuffling DataLoader for every step; it is timed in the process and
with two workers, which such an iterator starts anew each time. The folder is filled with random
bytes (no reader looks at them) and lies in the page cache, so what is timed is the way, not the disk.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastslots.bench.case import Case, Options, Provider, Run, Tensors
from fastslots.data.loader import Loader, to_float
from fastslots.data.packed.dataset import PackedDataset
from fastslots.data.packed.writer import write_packed
from fastslots.data.readers.scene import Scene

IMAGES = 2_000
STEPS = 8  # a timed call


class FloatImages(Dataset[Tensor]):
    """What a program without a batch reader does: one image at a time, uint8 [R, R, 3] -> fp32 [3, R, R] in [0, 1]."""

    def __init__(self, packed: PackedDataset):
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._packed[index]["image"]).permute(2, 0, 1).float() / 255


def loader_case(options: Options) -> Case:
    """STEPS batches of the preset's size a call, by iterators of torch's DataLoader and by ours."""
    from fastslots.config.presets import PRESETS

    config = options.config()
    batch = options.batch or (4 if options.tiny else PRESETS[options.preset]["batch_size"])
    count, R = (64 if options.tiny else IMAGES), config.resolution
    folder = tempfile.TemporaryDirectory(prefix="fastslots-bench-")
    packed = _packed(Path(folder.name) / "packed", count, R)
    dataset = FloatImages(packed)

    def torch_loader(workers: int, keep_workers: bool = False) -> DataLoader[Tensor]:
        return DataLoader(
            dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=keep_workers
        )

    def new_iterators(workers: int) -> Callable[[], Run]:
        def make() -> Run:
            loader = torch_loader(workers)
            return lambda: list(next(iter(loader)) for _ in range(STEPS))

        return make

    def one_iterator(workers: int) -> Callable[[], Run]:
        def make() -> Run:
            loader = torch_loader(workers, keep_workers=workers > 0)
            endless = itertools.chain.from_iterable(itertools.repeat(loader))
            return lambda: list(itertools.islice(endless, STEPS))

        return make

    def ours(prefetch: int) -> Callable[[], Run]:
        def make() -> Run:
            loader = Loader(packed, 0, batch, prefetch=prefetch)
            batches = iter(loader)

            def run() -> list[Tensor]:
                return list(to_float(item.images) for item in itertools.islice(batches, STEPS))

            weakref.finalize(run, loader.close)
            return run

        return make

    def expected() -> Tensors:
        return {"images": torch.tensor(float(STEPS * batch)), "wrong pixels": torch.tensor(0.0)}

    def view(batches: list[Tensor]) -> Tensors:
        """How many images came, and how many values differ from the file's at the index that an image carries."""
        wrong = 0
        for image in torch.cat(batches):
            index = int(image[0, 0, 0] * 255) * 256 + int(image[1, 0, 0] * 255)
            wrong += int((image * 255 != torch.from_numpy(packed[index]["image"]).permute(2, 0, 1)).sum())
        return {"images": torch.tensor(float(sum(map(len, batches)))), "wrong pixels": torch.tensor(float(wrong))}

    routes = {
        "new iterator a step": new_iterators(0),
        "new iterator a step, 2 workers": new_iterators(2),
        "DataLoader": one_iterator(0),
        "DataLoader, 2 workers": one_iterator(2),
        "fastslots, no thread": ours(0),
        "fastslots": ours(2),
    }
    images = STEPS * batch
    moved = images * R * R * 3 * (1 + 4)  # read as bytes, written as fp32
    providers = {name: Provider(make, bytes=moved) for name, make in routes.items()}
    case = Case("loader", {"B": batch, "R": R, "n": count}, providers, expected, view, clock="wall", items=images)
    weakref.finalize(case, folder.cleanup)
    return case


def _packed(folder: Path, count: int, size: int) -> PackedDataset:
    rng = np.random.default_rng(0)

    def scenes(start: int) -> Iterator[Scene | None]:
        for index in range(start, count):
            image = rng.integers(0, 256, (size, size, 3), np.uint8)
            image[0, 0, :2] = divmod(index, 256)  # so that the check knows which image came
            yield Scene(image, None, None)

    write_packed(folder, scenes, "random", "bench", {})
    return PackedDataset(folder)
