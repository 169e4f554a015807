"""A step's random numbers, the same bits on every device: noise, and which pixels of its images are decoded.

Number i of a purpose is output i of SplitMix64 (Steele et al., OOPSLA 2014), seeded with ``random_u64(seed, step,
purpose)``: a function of a counter, in a few operators over whole tensors, without a loop and without a read of the
device. What is made of the 64-bit words takes integer arithmetic and single IEEE operations, which round alike
everywhere; a logarithm or a cosine would not.

A step's keys may be a tensor on the device, so that a CUDA graph of one step draws the numbers of another.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.data.sampling import Purpose, random_u64, step_seed
from fastslots.step_records import StepDraws
from fastslots.train.pixels import drawn_pixels, pixel_probabilities, uniform_of

PURPOSES = (Purpose.NOISE, Purpose.PIXELS, Purpose.JACOBIAN, Purpose.QUERIES)
"""In the order of ``step_keys``."""
GOLDEN, FIRST, SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants, as int64."""
STEPS_AT_ONCE = 256
LEVELS, UNIT = 1 << 16, 2.0**-24
"""Quantiles of the normal distribution in a table, and the unit that they are whole multiples of."""


class Draws(NamedTuple):
    """All of a step's random numbers but its batch; they follow from (seed, step)."""

    noise: Tensor  # [B, K, D]
    query_noise: Tensor | None  # [B, K, S], where the first queries are sampled
    pixels: Tensor | None  # [B, P]
    pixel_weight: Tensor | None  # [B, P]
    jacobian_pixels: Tensor | None  # [B, P'], uniform: those that the Jacobian's penalty looks at


def step_keys(config: TrainConfig, step: int) -> list[int]:
    """The generator's seeds of a step, a purpose each, as int64."""
    seeds: list[int] = random_u64(config.seed, step, np.array(PURPOSES)).view(np.int64).tolist()
    return seeds


def draw(config: TrainConfig, step: int, images: Tensor, start: int = 0, keys: Tensor | None = None) -> Draws:
    """Noise and the pixel subset of a step.

    images: [b, C, R, R], those of the global batch from ``start`` on; image i gets its own numbers, whichever process
    computes it. keys: ``step_keys`` of the step, int64 [4] on the images' device; ``step`` is not looked at then.
    """
    if config.generator == "torch":
        return _draw_by_torch(config, step, images, start)
    if keys is None:
        keys = torch.tensor(step_keys(config, step)).to(images.device)
    of = dict(zip(PURPOSES, keys, strict=True))
    b, L, P = len(images), config.resolution**2, config.pixels_per_step
    noise = normal(of[Purpose.NOISE], b, start, config.num_slots, config.slot_dim)
    query_noise = jacobian_pixels = pixels = weight = None
    if config.queries == "sampled":
        query_noise = normal(of[Purpose.QUERIES], b, start, config.num_slots, config.token_width)
    if config.jacobian_weight:
        jacobian_pixels = uniform_of(words(of[Purpose.JACOBIAN], b, start, config.jacobian_pixels), L)
    if P:
        pixels, weight = drawn_pixels(images, config.pixel_sampling, words(of[Purpose.PIXELS], b, start, P))
    return Draws(noise, query_noise, pixels, weight, jacobian_pixels)


def step_draws(config: TrainConfig, step: int, images: Tensor, start: int) -> StepDraws:
    """The same for a kernel that draws noise and pixels itself, on the CPU; arguments as of ``draw``."""
    if config.generator == "torch":
        drawn = _draw_by_torch(config, step, images, start)
        return StepDraws(drawn.noise, drawn.pixels, drawn.pixel_weight, (0, 0), start, config.pixels_per_step)
    noise, pixels, *_ = _keys_of(config.seed, step // STEPS_AT_ONCE)[step % STEPS_AT_ONCE]
    return StepDraws(None, None, None, (noise, pixels), start, config.pixels_per_step)


@lru_cache(maxsize=2)
def _keys_of(seed: int, block: int) -> list[list[int]]:
    """The generator's seeds of STEPS_AT_ONCE steps, a purpose each; for one step NumPy's calls take 90 µs."""
    steps = np.arange(block * STEPS_AT_ONCE, (block + 1) * STEPS_AT_ONCE)
    keys: list[list[int]] = random_u64(seed, steps[:, None], np.array(PURPOSES)).tolist()
    return keys


def words(key: Tensor, count: int, start: int, *shape: int) -> Tensor:
    """Outputs of SplitMix64 seeded with ``key`` (int64, 0-d) for images ``start`` to ``start + count``, ``shape`` of
    them each: int64 [count, *shape], on the device of the key."""
    each = math.prod(shape)
    x = torch.arange(start * each + 1, (start + count) * each + 1, device=key.device)
    x = x.mul_(GOLDEN).add_(key)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x.bitwise_xor_(_shifted(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, 31)).view(count, *shape)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of unsigned numbers; torch's shift of int64 fills with the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def normal(key: Tensor, count: int, start: int, *shape: int) -> Tensor:
    """Standard normal numbers, fp32 [count, *shape], of the words of the same arguments.

    Half the sum of four quantiles, one for each 16 bits of a word, added as whole numbers: of variance 1, up to 8.7 in
    size. The density is the normal one within 1 % up to 4 and 10 % up to 5 standard deviations.
    """
    quarters = words(key, count, start, *shape).view(torch.int16).int().add_(LEVELS // 2)
    table = quantiles(key.device, key.is_meta)
    total = table.index_select(0, quarters.flatten()).view(count, *shape, 4).sum(-1, dtype=torch.int32)
    return total.float().mul_(UNIT / 2)


@cache
def quantiles(device: torch.device, without_values: bool = False) -> Tensor:
    """Quantiles (i + 1/2) / 2^16 of the normal distribution in units of ``UNIT``, scaled to variance 1: int32.

    without_values: for tensors on ``meta`` that say they are on this device.
    """
    standard = NormalDist()
    lower = [standard.inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS // 2)]
    scale = (math.fsum(z * z for z in lower) / len(lower)) ** -0.5 / UNIT
    whole = [round(z * scale) for z in lower]
    return torch.tensor([*whole, *(-z for z in reversed(whole))], dtype=torch.int32).to(device)


def _draw_by_torch(config: TrainConfig, step: int, images: Tensor, start: int) -> Draws:
    """As ``draw``, of torch's generator on the CPU: what runs had before ``generator`` was a field of theirs."""
    B, L, P = config.batch_size, config.resolution**2, config.pixels_per_step
    device, ours = images.device, slice(start, start + len(images))
    generator = torch.Generator().manual_seed(step_seed(config.seed, step, Purpose.NOISE))
    noise = torch.randn(B, config.num_slots, config.slot_dim, generator=generator)[ours].to(device)
    query_noise = jacobian_pixels = None
    if config.queries == "sampled":
        generator.manual_seed(step_seed(config.seed, step, Purpose.QUERIES))
        query_noise = torch.randn(B, config.num_slots, config.token_width, generator=generator)[ours].to(device)
    if config.jacobian_weight:
        generator.manual_seed(step_seed(config.seed, step, Purpose.JACOBIAN))
        jacobian_pixels = torch.randint(L, (B, config.jacobian_pixels), generator=generator)[ours].to(device)
    if not P:
        return Draws(noise, query_noise, None, None, jacobian_pixels)
    generator.manual_seed(step_seed(config.seed, step, Purpose.PIXELS))
    if config.pixel_sampling == "uniform":
        pixels = torch.randint(L, (B, P), generator=generator)[ours].to(device)
        return Draws(noise, query_noise, pixels, None, jacobian_pixels)
    probability = pixel_probabilities(images, config.pixel_sampling).cpu()
    # Every row takes P numbers from the generator: rows before this process's stand in for images it has not read.
    probabilities = torch.cat([probability.new_full((start, L), 1 / L), probability])
    pixels = torch.multinomial(probabilities, P, replacement=True, generator=generator)[start:]
    weight = 1 / (L * probability.gather(1, pixels))
    return Draws(noise, query_noise, pixels.to(device), weight.to(device), jacobian_pixels)
