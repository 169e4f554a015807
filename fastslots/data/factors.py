"""Generating factors of a scene's objects, whatever data set holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastslots.data.builtin import BUILTIN, BuiltinScenes
from fastslots.data.readers.pictures import CODES
from fastslots.errors import UserError

_NOT_OF_OBJECTS = {"visibility", "latents"}  # whether there is an object; a table whose columns nothing names


def object_factors(dataset: Any, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """name -> [n, objects, ...] of these images; {} where the data tell nothing of their objects."""
    return _of_objects(_all_factors(dataset, np.asarray(rows)))


def numbered_objects(dataset: Any, rows: Sequence[int] | np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The factors that are one number an object, name -> [n, objects], and bool [n, objects]: which of those are an
    object, neither background nor padding.

    An object is what "visibility" says, or, without it, what has any factor that is not 0. Factors of another length
    than "visibility" are none of objects. UserError where lengths differ and nothing tells which are.
    """
    found = _all_factors(dataset, np.asarray(rows))
    factors, seen = _of_objects(found), found.get("visibility")
    if seen is not None and seen.ndim == 2:
        factors = {name: values for name, values in factors.items() if values.shape[1] == seen.shape[1]}
        present = seen > 0
    else:
        lengths = {name: values.shape[1] for name, values in factors.items()}
        if len(set(lengths.values())) > 1:
            differ = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise UserError(f"factors of an image differ in length ({differ}): give visibility, a number an object")
        marks = [(values != 0).reshape(*values.shape[:2], -1).any(2) for values in factors.values()]
        present = np.any(marks, 0) if marks else np.zeros((len(rows), 0), bool)
    if not counts_from_one(dataset):
        present[:, :1] = False
    return {name: values for name, values in factors.items() if values.ndim == 2}, present


def _of_objects(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in found.items() if name not in _NOT_OF_OBJECTS and values.ndim > 1}


def counts_from_one(dataset: Any) -> bool:
    """Factors of built-in data begin with the object of mask label 1; published sets' with the background, label 0."""
    return _builtin(dataset) is not None


def factor_words(dataset: Any) -> Mapping[str, tuple[str, ...]]:
    """Names of the values of factors that are codes, counted from 1."""
    builtin = _builtin(dataset)
    if builtin:
        return builtin.WORDS
    return CODES if _kind(dataset).removeprefix("features of ").startswith("CLEVR") else {}


def _builtin(dataset: Any) -> type[BuiltinScenes] | None:
    """The class of built-in data, made on the fly or packed."""
    whole = _whole(dataset)
    if isinstance(whole, BuiltinScenes):
        return type(whole)
    kind = _kind(dataset).removeprefix("features of ")
    return next((builtin for builtin in BUILTIN.values() if kind == builtin.KIND), None)


def _kind(dataset: Any) -> str:
    return getattr(getattr(_whole(dataset), "info", None), "kind", "")


def _whole(dataset: Any) -> Any:
    """What a torch ``Subset`` is part of."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _all_factors(dataset: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    found = dataset.factors_of(rows) if hasattr(dataset, "factors_of") else _stacked(dataset, rows)
    # The object-centric-library keeps numbers as columns, [objects, 1].
    return {
        name: values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values for name, values in found.items()
    }


def _stacked(dataset: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    given = [_factors_of_item(dataset[int(row)]) for row in rows]  # not the items: their pictures may fill the memory
    names = set.intersection(*(set(factors) for factors in given)) if given else set()
    try:
        return {name: np.stack([factors[name] for factors in given]) for name in sorted(names)}
    except ValueError as error:
        raise UserError(f"the images' factors differ in shape ({error}): give every image the same") from None


def _factors_of_item(item: Any) -> Mapping[str, Any]:
    return item.get("factors") or {} if isinstance(item, dict) else {}
