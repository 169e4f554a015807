"""A picture of some scenes of a data set as they were understood: images above, their masks below."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastslots.errors import UserError

SHOWN = 8  # scenes, from all over the set
SIDE = 96  # small images are enlarged to at least this
GAP = 2


def draw_scenes(path: str, out: Path, unscored: int | None = None, **options: Any) -> None:
    """Each label has a colour, the background is dark, what is not scored white. UserError where ``out`` cannot be
    written; unscored: the label of what is not, None: as the set says; options: of ``open_dataset``."""
    from PIL import Image

    from fastslots.data import open_dataset
    from fastslots.report.pictures import labels

    dataset = open_dataset(path, **options)
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).astype(int))
    images, masks = dataset.batch(rows)
    pictures = [images]
    if masks is not None:
        drawn = labels(masks)
        label = dataset.info.ignore_label if unscored is None else unscored
        drawn[masks == (-1 if label is None else label)] = 255
        pictures.append(drawn)
    factor = max(1, -(-SIDE // images.shape[1]))
    lines = [_row(list(of_scenes.repeat(factor, 1).repeat(factor, 2))) for of_scenes in pictures]
    gap = np.full((GAP, *lines[0].shape[1:]), 255, np.uint8)
    picture = np.concatenate([part for line in lines for part in (line, gap)][:-1])
    try:
        Image.fromarray(picture).save(out, "PNG")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): name another place") from None
    print(f"drew {len(rows)} scenes in {out}" + (", masks below" if masks is not None else ""), file=sys.stderr)


def _row(tiles: list[np.ndarray]) -> np.ndarray:
    gap = np.full((tiles[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=1)
