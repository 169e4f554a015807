"""Rates and weights as pure functions of the step (from 1), so that a resume needs no state."""

from __future__ import annotations

import math

from fastslots.config.run import TrainConfig

PLATEAU_END = 30_000  # the published schedule; the other constants are beside their use
DECAY_STEPS = 500_000


def lr_at(config: TrainConfig, step: int) -> float:
    """Learning rate of update ``step``."""
    peak, warmup = config.lr, config.warmup
    if config.schedule.startswith("paper"):
        return _paper(config, step - 1)
    rise = min(1.0, step / warmup) if warmup else 1.0
    if config.schedule == "cosine":
        return peak * rise * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
    return peak * rise


def _paper(config: TrainConfig, t: int) -> float:
    """f(t) of the published program, which sets the rate after each update: update n uses f(n - 1), the first has 0.

    sprites, clevr6: warm-up, the peak until 30,000, then a fifth of it times 0.1^((t - 30,000) / 500,000). The rate
    set at t = 30,000 is, for that one update, the peak times 0.1^((30,000 - warmup) / 500,000).
    clevrtex: warm-up, then the peak times 0.1^((t - warmup) / 500,000).
    """
    peak, warmup = config.lr, config.warmup
    if t < warmup:
        return peak * t / warmup
    if config.schedule == "paper-clevrtex":
        return peak * 0.1 ** ((t - warmup) / DECAY_STEPS)
    if t < PLATEAU_END:
        return peak
    if t == PLATEAU_END:
        return peak * 0.1 ** ((PLATEAU_END - warmup) / DECAY_STEPS)
    return peak / 5 * 0.1 ** ((t - PLATEAU_END) / DECAY_STEPS)


def alpha_at(config: TrainConfig, step: int) -> float:
    """Weight of the interaction penalty; published: alpha · min(1, step / 25,000)."""
    return config.alpha * _alpha_share(config, step)


def jacobian_weight_at(config: TrainConfig, step: int) -> float:
    """Weight of the Jacobian's interaction penalty, which grows as alpha does."""
    return config.jacobian_weight * _alpha_share(config, step)


def beta_at(config: TrainConfig, step: int) -> float:
    """Weight of the KL term."""
    return config.beta * _ramp(step, config.beta_start, config.beta_warmup)


def _alpha_share(config: TrainConfig, step: int) -> float:
    rise = _ramp(step, config.alpha_start, config.alpha_warmup)
    return config.alpha_floor + (1 - config.alpha_floor) * rise


def _ramp(step: int, start: int, length: int) -> float:
    """0 up to ``start``, then linear over ``length`` steps to 1."""
    if length == 0:
        return float(step > start)
    return min(max((step - start) / length, 0.0), 1.0)
