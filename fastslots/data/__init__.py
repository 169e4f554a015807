"""Data sets, recognised by content, and batches drawn from (seed, step) alone."""

from fastslots.data.builtin.sprites import SpritesDataset
from fastslots.data.loader import Batch, Loader, read_batch, to_float
from fastslots.data.open import open_dataset
from fastslots.data.sampling import batch_indices, step_seed
from fastslots.data.splits import Splits, split_indices

__all__ = [
    "Batch",
    "Loader",
    "Splits",
    "SpritesDataset",
    "batch_indices",
    "open_dataset",
    "read_batch",
    "split_indices",
    "step_seed",
    "to_float",
]
