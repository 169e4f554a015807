"""A training step that never waits for its device: one CUDA graph, and losses that are read a step late."""

from fastslots.train.device.steps import Done, Steps, steps_of

__all__ = ["Done", "Steps", "steps_of"]
