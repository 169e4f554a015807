"""Generating factors of a scene's objects, whatever data set holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastslots.data.pictures import CODES
from fastslots.data.sprites import SHAPES, SpritesDataset
from fastslots.errors import UserError

_NOT_OF_OBJECTS = {"visibility", "latents"}  # whether there is an object; a table whose columns nothing names


def object_factors(dataset: Any, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """name -> [n, objects, ...] of these images; {} where the data tell nothing of their objects."""
    found = _all_factors(dataset, np.asarray(rows))
    return {name: values for name, values in found.items() if name not in _NOT_OF_OBJECTS and values.ndim > 1}


def present_objects(dataset: Any, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """bool [n, objects]: which rows of ``object_factors`` are an object, and neither background nor padding."""
    found = _all_factors(dataset, np.asarray(rows))
    if "visibility" in found:
        present = found["visibility"] > 0
    else:
        of_objects = [v for name, v in found.items() if name not in _NOT_OF_OBJECTS and v.ndim > 1]
        present = np.any([(v != 0).reshape(*v.shape[:2], -1).any(2) for v in of_objects], 0)
    if not counts_from_one(dataset):
        present = present.copy()
        present[:, 0] = False
    return present


def counts_from_one(dataset: Any) -> bool:
    """Our sprites' factors begin with the object of mask label 1; published sets' with the background, label 0."""
    return _is_sprites(dataset)


def factor_words(dataset: Any) -> Mapping[str, tuple[str, ...]]:
    """Names of the values of factors that are codes, counted from 1."""
    if _is_sprites(dataset):
        return {"shape": SHAPES}
    return CODES if _kind(dataset).removeprefix("features of ").startswith("CLEVR") else {}


def _is_sprites(dataset: Any) -> bool:
    return isinstance(dataset, SpritesDataset) or _kind(dataset).endswith("generated sprites")


def _kind(dataset: Any) -> str:
    return getattr(getattr(dataset, "info", None), "kind", "")


def _all_factors(dataset: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    if hasattr(dataset, "factors_of"):
        return dataset.factors_of(rows)
    items = [dataset[int(row)] for row in rows]
    given = [item.get("factors") or {} if isinstance(item, dict) else {} for item in items]
    names = set.intersection(*(set(factors) for factors in given)) if given else set()
    try:
        return {name: np.stack([factors[name] for factors in given]) for name in sorted(names)}
    except ValueError as error:
        raise UserError(f"the images' factors differ in shape ({error}): give every image the same") from None
