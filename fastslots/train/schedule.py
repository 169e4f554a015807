"""Rates and weights as pure functions of the step (from 1), so that a resume needs no state."""

from __future__ import annotations

import math

from fastslots.config.run import TrainConfig


def lr_at(config: TrainConfig, step: int) -> float:
    """Learning rate of update ``step``."""
    peak, warmup = config.lr, config.in_steps("warmup")
    if config.schedule.startswith("paper"):
        return _paper(config, step - 1)
    rise = min(1.0, step / warmup) if warmup else 1.0
    if config.schedule == "cosine":
        return peak * rise * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
    return peak * rise


def _paper(config: TrainConfig, t: int) -> float:
    """f(t) of the published program, which sets the rate after each update: update n uses f(n - 1), the first has 0.

    Published are plateau_end 30,000 and decay_steps 500,000, 6 % and 100 % of that run. With them,

    sprites, clevr6: warm-up, the peak until 30,000, then a fifth of it times 0.1^((t - 30,000) / 500,000). The rate
    set at t = 30,000 is, for that one update, the peak times 0.1^((30,000 - warmup) / 500,000).
    clevrtex: warm-up, then the peak times 0.1^((t - warmup) / 500,000).
    """
    peak, warmup = config.lr, config.in_steps("warmup")
    plateau_end, decay = config.in_steps("plateau_end"), config.in_steps("decay_steps")
    if t < warmup:
        return peak * t / warmup
    if config.schedule == "paper-clevrtex":
        return peak * math.pow(0.1, (t - warmup) / decay)
    if t < plateau_end:
        return peak
    if t == plateau_end:
        return peak * math.pow(0.1, (plateau_end - warmup) / decay)
    return peak / 5 * math.pow(0.1, (t - plateau_end) / decay)


def alpha_at(config: TrainConfig, step: int) -> float:
    """Weight of the interaction penalty; published: alpha · min(1, step / 25,000)."""
    return config.alpha * _alpha_share(config, step)


def jacobian_weight_at(config: TrainConfig, step: int) -> float:
    """Weight of the Jacobian's interaction penalty, which grows as alpha does."""
    return config.jacobian_weight * _alpha_share(config, step)


def beta_at(config: TrainConfig, step: int) -> float:
    """Weight of the KL term."""
    return config.beta * _ramp(step, config.in_steps("beta_start"), config.in_steps("beta_warmup"))


def _alpha_share(config: TrainConfig, step: int) -> float:
    rise = _ramp(step, config.in_steps("alpha_start"), config.in_steps("alpha_warmup"))
    return config.alpha_floor + (1 - config.alpha_floor) * rise


def _ramp(step: int, start: int, length: int) -> float:
    """0 up to ``start``, then linear over ``length`` steps to 1."""
    if length == 0:
        return float(step > start)
    return min(max((step - start) / length, 0.0), 1.0)


def late_ramps(config: TrainConfig) -> list[str]:
    """What a run of this length never reaches, a sentence each: ramps that end after its last step."""
    alpha = config.in_steps("alpha_start") + config.in_steps("alpha_warmup")
    beta = config.in_steps("beta_start") + config.in_steps("beta_warmup")
    ramps = [
        ("the learning rate", config.in_steps("warmup"), True, "--warmup"),
        ("alpha", alpha, bool(config.alpha or config.jacobian_weight) and config.alpha_floor != 1, "--alpha_warmup"),
        ("beta", beta, bool(config.beta), "--beta_warmup"),
    ]
    return [
        f"{name} is still rising at the last step, {config.steps:,}: its ramp ends at step {end:,}; "
        f"shorten {flag}, or give it as a share of the run such as 5%"
        for name, end, used, flag in ramps
        if used and end > config.steps
    ]


def due(step: int, every: int) -> bool:
    """Whether something is to happen after a step: at every multiple; 0: never."""
    return every > 0 and step % every == 0
