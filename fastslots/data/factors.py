"""Generating factors of a scene's objects, whatever data set holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastslots.data.builtin import BUILTIN, BuiltinScenes
from fastslots.data.dataset import SceneDataset, Split
from fastslots.data.map_style import MapStyleDataset
from fastslots.data.readers.pictures import CODES
from fastslots.errors import UserError

_NOT_OF_OBJECTS = {"visibility", "latents"}  # whether there is an object; a table whose columns nothing names


@dataclass(frozen=True)
class FactorFormat:
    """How a data set numbers its objects, and names the values of their factors."""

    first_label: int = 0  # mask label of the factors' first object: published sets begin with the background, label 0
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of factors that are codes, counted from 1


def factor_format(dataset: SceneDataset) -> FactorFormat:
    """That of built-in scenes, or of the kind that files say they hold."""
    whole = dataset.whole if isinstance(dataset, MapStyleDataset) else dataset
    if isinstance(whole, BuiltinScenes):
        return FactorFormat(1, whole.WORDS)
    if isinstance(whole, SceneDataset) and whole.info is not None:
        return format_of_kind(whole.info.kind)
    return FactorFormat()


def format_of_kind(kind: str) -> FactorFormat:
    """kind: ``DatasetInfo.kind``, which a file holds as text."""
    kind = kind.removeprefix("features of ")
    builtin = next((builtin for builtin in BUILTIN.values() if kind == builtin.KIND), None)
    return FactorFormat(1, builtin.WORDS) if builtin else FactorFormat(0, CODES if kind.startswith("CLEVR") else {})


def object_factors(split: Split) -> dict[str, np.ndarray]:
    """name -> [n, objects, ...] of these images; {} where the data tell nothing of their objects."""
    return _of_objects(_flat(split.factors()))


def numbered_objects(split: Split) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The factors that are one number an object, name -> [n, objects], and bool [n, objects]: which of those are an
    object, neither background nor padding.

    An object is what "visibility" says, or, without it, what has any factor that is not 0. Factors of another length
    than "visibility" are none of objects. UserError where lengths differ and nothing tells which are.
    """
    everything = _flat(split.factors())
    factors, visible = _of_objects(everything), everything.get("visibility")
    if visible is not None and visible.ndim == 2:
        factors = {name: values for name, values in factors.items() if values.shape[1] == visible.shape[1]}
        present = visible > 0
    else:
        lengths = {name: values.shape[1] for name, values in factors.items()}
        if len(set(lengths.values())) > 1:
            differ = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise UserError(f"factors of an image differ in length ({differ}): give visibility, a number an object")
        marks = [(values != 0).reshape(*values.shape[:2], -1).any(2) for values in factors.values()]
        present = np.any(marks, 0) if marks else np.zeros((len(split), 0), bool)
    if not factor_format(split.dataset).first_label:
        present[:, :1] = False
    return {name: values for name, values in factors.items() if values.ndim == 2}, present


def _of_objects(factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in factors.items() if name not in _NOT_OF_OBJECTS and values.ndim > 1}


def _flat(factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The object-centric-library keeps numbers as columns, [n, objects, 1]."""
    return {
        name: values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        for name, values in factors.items()
    }
