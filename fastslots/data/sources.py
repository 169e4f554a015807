"""The images of a run: built-in sprites, a data set on disk, or any torch data set, each with its split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.config.code import GIVEN
from fastslots.config.run import TrainConfig
from fastslots.data import SpritesDataset, split_indices, to_float
from fastslots.data.builtin import BUILTIN, TexturedSpritesDataset, generate
from fastslots.data.builtin.sprites import FACTORS
from fastslots.data.dataset import MixedScenes, SceneDataset, Split
from fastslots.data.factors import factor_format, numbered_objects
from fastslots.data.holdout import Holdout
from fastslots.data.map_style import MapStyleDataset, as_scenes, check_map_style, look_at
from fastslots.data.packed.dataset import DatasetInfo
from fastslots.data.packed.features import FeatureDataset, is_features
from fastslots.data.sampling import Purpose, step_seed
from fastslots.errors import UserError

HELD_OUT = 1_000  # built-in images in val and in test
ON_THE_FLY = ("sprites", "sprites-textured")  # built-in data that cost less than a step
SEARCH = 100  # scenes that are looked through for each with a held-out combination


@dataclass(frozen=True)
class Source:
    """What a run reads: each split's scenes, and what is known of them."""

    description: str
    splits: dict[str, Split]  # train, val, test
    warnings: list[str] = field(default_factory=list)  # what looks wrong (``fastslots data check``)
    digest: str = ""  # fingerprint of a set on disk
    split_note: str = ""  # how many images each split has, and by which rule; part of the description

    def on_training_images(self, split: str) -> bool:
        """Whether a split is the training images: of a set that has too few to set some aside."""
        asked, trained = self.splits[split], self.splits["train"]
        return asked.dataset is trained.dataset and len(asked) > 0 and asked.rows[0] in trained.rows


def open_source(config: TrainConfig, dataset: Any = None, few: bool = False) -> Source:
    """The images of ``config.data``, or of ``dataset`` (any map-style data set; see ``fastslots.data.read_batch``).

    few: not many of them will be read, so that built-in scenes that are not in the cache are made when they are asked
    for; the pixels are the same.

    Raises UserError where training would fail: unreadable data, or images of another shape than the model's.
    """
    source = _opened(config, dataset, few)
    if config.ignore_label < 0:
        return source
    splits = {name: replace(split, unscored=config.ignore_label) for name, split in source.splits.items()}
    return replace(source, splits=splits)


def training_source(config: TrainConfig, dataset: Any = None) -> Source:
    """As ``open_source``, looked at (``looked_at``), and with the images of ``config.mix`` among those that train.

    Validation and test images are those of ``config.data`` alone.
    """
    source = looked_at(open_source(config, dataset), config)
    if config.mix in ("", config.data):
        return source
    other = open_source(replace(config, data=config.mix, mix=""))
    mixed = MixedScenes(source.splits["train"], other.splits["train"], config.mix_share)
    train = Split(mixed, range(len(mixed)))
    description = f"{source.description}\nmixed     {config.mix_share:.0%} of the training images: {other.description}"
    warnings = [*source.warnings, *other.warnings]
    return replace(source, description=description, warnings=warnings, splits=source.splits | {"train": train})


def _opened(config: TrainConfig, dataset: Any, few: bool) -> Source:
    if dataset is not None:
        return _given(dataset, config.holdout)
    if config.data.startswith(GIVEN):
        raise UserError(f"the run's images were {config.data.removeprefix(GIVEN)}: name a data set with --data")
    check_named(config)
    if (config.input == "features") != is_features(config.data):
        raise UserError(
            f"this model reads features of a frozen network, and {config.data} holds none: make them with "
            f"`fastslots data features DATA --checkpoint FILE --out DIR` and train with --data DIR"
            if config.input == "features"
            else f"{config.data} holds features of a frozen network: train preset clevrtex, or set --input features"
        )
    if config.input == "features":
        features = FeatureDataset(Path(config.data), config.max_objects or None)
        made = f"{features.channels} x {features.side} x {features.side} by {features.made_by.get('checkpoint')}"
        source = _split(features, f"{features.info}; {made}", config.holdout, features.info)
        return replace(source, digest=features.info.digest)
    if config.data in ON_THE_FLY:
        return _builtin(config)
    if few and config.data in BUILTIN and not config.holdout and not _in_cache(config).exists():
        scenes = BUILTIN[config.data](0, config.resolution, config.builtin_objects(), generate.CACHED)
        least, most = config.builtin_objects()
        about = f"{least} to {most} objects at {config.resolution} x {config.resolution}"
        return _split(scenes, f"built-in {config.data}, made as they are read: {about}", "")
    from fastslots.data import open_dataset
    from fastslots.data.check import check
    from fastslots.data.packed.urls import is_remote

    max_objects = config.max_objects or None
    # What is read by byte range is not read whole first; what is fetched was compared with its checksum then.
    path = _made_once(config) if config.data in BUILTIN else config.data
    quick = is_remote(path)
    report = check(path, max_objects, config.resolution, quick=quick, on_bad_record=config.on_bad_record)
    opened = open_dataset(path, max_objects, config.resolution, config.on_bad_record)
    source = _split(opened, str(opened.info), config.holdout, opened.info)
    return replace(source, warnings=report.warnings, digest=opened.info.digest)


def _given(dataset: Any, holdout: str) -> Source:
    """A data set that Python code has handed over."""
    scenes = as_scenes(dataset)
    if isinstance(scenes, MapStyleDataset):
        check_map_style(dataset)
    return _split(scenes, f"{type(dataset).__name__} of {len(scenes)} images", holdout)


def check_named(config: TrainConfig) -> None:
    """UserError where a preset needs a data set and none is named."""
    if not config.data:
        what = f"preset {config.preset_name} is" if config.preset_name else "this configuration is"
        raise UserError(
            f"{what} for data that are not built in: name them with --data (docs/data.md says where to get them), "
            f"or try --data sprites"
        )


def _builtin(config: TrainConfig) -> Source:
    """Scenes made on the fly. Validation and test scenes are the same for every seed of a run."""
    objects = config.builtin_objects()
    avoid = _avoidable(config) if config.holdout else None

    def sprites(seed: int, count: int) -> Split:
        return Split(_sprites(config, seed, count, avoid), range(count))

    splits = {
        "train": sprites(step_seed(config.seed, 0, Purpose.TRAIN) >> 1, 1 << 31),
        "val": sprites(step_seed(0, 0, Purpose.VAL) >> 1, HELD_OUT),
        "test": sprites(step_seed(0, 0, Purpose.TEST) >> 1, HELD_OUT),
    }
    least, most = objects
    shapes = f"{least} to {most} coloured shapes at {config.resolution} x {config.resolution}"
    without = f", none with {config.holdout}" if config.holdout else ""
    note = f"val and test {HELD_OUT} images each"
    return Source(f"built-in {config.data}, made on the fly: {shapes}{without}; {note}", splits, split_note=note)


def _sprites(config: TrainConfig, seed: int, count: int, avoid: Holdout | None = None) -> SpritesDataset:
    kind = TexturedSpritesDataset if config.data == "sprites-textured" else SpritesDataset
    return kind(seed, config.resolution, config.builtin_objects(), count, avoid)


def _in_cache(config: TrainConfig) -> Path:
    return generate.cache_folder(config.data, 0, config.resolution, config.builtin_objects())


def _made_once(config: TrainConfig) -> str:
    """The folder in the cache of built-in scenes that cost more than a step each."""
    from fastslots.notices import Progress

    with Progress(lambda done: done / generate.CACHED) as progress:
        return str(generate.cached(config.data, 0, config.resolution, config.builtin_objects(), progress))


def unseen(config: TrainConfig, count: int) -> Split:
    """The first ``count`` test images with an object that ``config.holdout`` kept from the run.

    Of a data set on disk they are those of the test split that were set aside, fewer where there are not so many; of
    the built-in data scenes of the test seed as they come, so that their other objects are as everywhere.

    Raises UserError where the run held nothing out, or built-in scenes are rarer than one in ``SEARCH``.
    """
    if not config.holdout:
        raise UserError("the run held no combination out: train with --holdout shape=square,hue=0.5:0.75, say")
    if config.data not in ON_THE_FLY:
        test = open_source(replace(config, holdout="")).splits["test"]
        rows = np.asarray(test.rows)[_held_out(test, config.holdout)]
        if not len(rows):
            raise UserError(f"holdout {config.holdout!r}: no test image has such an object: widen it")
        return replace(test, rows=rows[:count])
    holdout = _builtin_holdout(config)
    dataset = _sprites(config, step_seed(0, 0, Purpose.TEST) >> 1, SEARCH * count)
    parts: list[np.ndarray] = []
    for first in range(0, len(dataset), HELD_OUT):
        scenes = np.arange(first, min(first + HELD_OUT, len(dataset)))
        parts.append(scenes[holdout.matches(*numbered_objects(Split(dataset, scenes)))])
        if sum(map(len, parts)) >= count:
            return Split(dataset, np.concatenate(parts)[:count])
    raise UserError(f"holdout {config.holdout!r}: fewer than one scene in {SEARCH} has such an object: widen it")


def _builtin_holdout(config: TrainConfig) -> Holdout:
    return Holdout.parse(config.holdout, FACTORS, SpritesDataset.WORDS)


def _avoidable(config: TrainConfig) -> Holdout:
    """The holdout of a run on scenes made on the fly. UserError where ``SpritesDataset`` could not redraw them all."""
    holdout, scenes = _builtin_holdout(config), SpritesDataset(0, 16, config.builtin_objects())
    if holdout.matches(*numbered_objects(Split(scenes, range(HELD_OUT)))).mean() > 0.9:
        raise UserError(f"holdout {config.holdout!r}: more than 9 in 10 scenes have such an object: narrow it")
    return holdout


def _held_out(split: Split, holdout: str) -> np.ndarray:
    """bool: which images have an object with the combination. UserError where the data do not tell."""
    factors, present = numbered_objects(split)
    if not factors:
        raise UserError("holdout needs data that tell factors of their objects (shape, colour, ...): leave it out")
    return Holdout.parse(holdout, tuple(factors), factor_format(split.dataset).words).matches(factors, present)


def _split(dataset: SceneDataset, description: str, holdout: str, info: DatasetInfo | None = None) -> Source:
    if not len(dataset):
        raise UserError(f"{description}: no images are left; raise --max_objects or name another data set")
    splits = split_indices(len(dataset), *((info.published_split, info.parts) if info else ()))
    rows = {"train": splits.train, "val": splits.val, "test": splits.test}
    whole = {name: Split(dataset, part) for name, part in rows.items()}
    if not holdout:
        return Source(f"{description}; {splits}", whole, split_note=str(splits))
    kept = {name: Split(dataset, np.asarray(part.rows)[~_held_out(part, holdout)]) for name, part in whole.items()}
    for name, part in kept.items():
        if not len(part):
            raise UserError(f"holdout {holdout!r}: every image of {name} has such an object: narrow it")
    counts = ", ".join(f"{len(part):,} of {len(whole[name]):,} {name}" for name, part in kept.items())
    note = f"{splits}; none with {holdout} ({counts} images left)"
    return Source(f"{description}; {note}", kept, split_note=note)


def same_images(before: str, now: str) -> bool:
    """Whether two descriptions are of one set, whose path may have been given relative to the working directory."""
    here = f"{Path.cwd()}/"
    return before.replace(here, "").strip() == now.replace(here, "").strip()


def check_shape(images: Tensor, channels: int, side: int) -> None:
    """UserError unless a float batch [b, C, R, R] has ``channels`` and ``side``, the model's."""
    expected = (channels, side, side)
    if tuple(images.shape[1:]) != expected:
        raise UserError(
            f"the data gives images of shape {list(images.shape[1:])}, the model expects {list(expected)}: "
            f"set --resolution (and --channels), or give images of that size"
        )


def looked_at(source: Source, config: TrainConfig) -> Source:
    """With what some of its images say, before the first step: UserError where they do not fit the model, or, of a data
    set that Python code has handed over, where items are not what they should be; else with warnings."""
    train, val = source.splits["train"], source.splits["val"]
    if isinstance(train.dataset, MapStyleDataset):
        images, warnings = look_at(train.dataset, (train, val))
        source = replace(source, warnings=[*source.warnings, *warnings])
    else:
        images = train[:1].read()[0].numpy()
    check_shape(to_float(torch.from_numpy(images[:1])), config.channels, config.resolution)
    return source
