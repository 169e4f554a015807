"""A step whose work is in the device's queue when it returns, on tensors of fixed addresses.

Forward, backward, clipping and update follow from the images, the parameters and a few numbers on the device: the
rate, the weights of the terms, the generator's keys. So a CUDA graph of one step is a graph of all. What the host
would decide is decided there: ``stopped`` becomes 1 at the first loss or gradient that is not finite, and from then on
no update changes anything, so that the host may notice a step late.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.errors import first_line
from fastslots.models import SlotVAE
from fastslots.train.device.queue import Queue
from fastslots.train.draws import draw, step_keys
from fastslots.train.optim import Optimizers, clip
from fastslots.train.schedule import alpha_at, beta_at, lr_at
from fastslots.train.step import Precision, Weights, gradients


class DeviceStep:
    """Calls are steps; each gives what reads its values: those of ``step.gradients``, then the gradients' norm.

    Args:
        queue: the device's.
        say: told in a line what takes long, and where a step is no graph after all.
        captured: whether a step is to be one graph.
    """

    def __init__(
        self,
        model: SlotVAE,
        optimizers: Optimizers,
        precision: Precision,
        config: TrainConfig,
        queue: Queue,
        say: Callable[[str], None] = lambda text: None,
        captured: bool = True,
    ):
        self._model, self._optimizers, self._precision, self._config = model, optimizers, precision, config
        self._queue, self._say, self._captured = queue, say, captured
        device = next(model.parameters()).device
        self._keys = torch.zeros(len(step_keys(config, 1)), dtype=torch.int64, device=device)
        self._alpha, self._beta, self.stopped = (torch.zeros((), device=device) for _ in range(3))
        self._images = torch.empty(0, device=device)
        self._values = torch.empty(0, device=device)
        self._replay: Callable[[], object] | None = None

    def __call__(self, step: int, images: Tensor) -> Callable[[], list[float]]:
        """images: fp32 [B, C, R, R] on the device."""
        self._set_numbers(step)
        if self._replay is None:
            self._images = images.clone()
            self._replay = self._prepared()
        self._images.copy_(images)
        self._replay()
        return self._queue.later(self._values)

    def work(self) -> None:
        """One step, on this object's tensors. Nothing of it waits for the device, or looks at a Python number that
        changes from step to step."""
        config, params = self._config, [*self._model.parameters()]
        self._optimizers.zero_grad()
        draws = draw(config, 0, self._images, keys=self._keys)
        # Where the term is left out of the configuration it is left out of the graph.
        alpha, beta = self._alpha if config.alpha else 0.0, self._beta if config.beta else 0.0
        sums = gradients(self._model, self._precision, config, self._images, draws, Weights(alpha, beta))
        norm = clip(params, config.grad_clip)
        finite = torch.isfinite(sums[0]) & torch.isfinite(norm)
        self.stopped.copy_(torch.where(finite, self.stopped, 1.0))
        self._optimizers.step_unless(self.stopped)
        self._values.copy_(torch.cat([sums, norm.reshape(1)]))

    def _set_numbers(self, step: int) -> None:
        """By value: a copy from memory of the host would have to be waited for."""
        for place, key in enumerate(step_keys(self._config, step)):
            self._keys[place].fill_(key)
        self._alpha.fill_(alpha_at(self._config, step))
        self._beta.fill_(beta_at(self._config, step))
        self._optimizers.set_lr(lr_at(self._config, step))

    def _prepared(self) -> Callable[[], object]:
        """What does ``work``: a graph of it, or the operators themselves."""
        self._values = torch.zeros(5, device=self._images.device)
        if not self._captured:
            return self.work
        before = self._optimizers.state()
        try:
            return self._queue.capture(self.work, self._rehearse)
        except RuntimeError as error:
            self._say(f"warning   a step is no CUDA graph, it goes operator by operator ({first_line(error)})")
        # It may have ended anywhere: gradients are of the stream of rehearsals, whose memory other streams cannot use,
        # and an optimiser takes state that is half made for whole.
        self._optimizers.zero_grad()
        self._optimizers.load_state(*before)
        torch.cuda.empty_cache()
        return self.work

    def _rehearse(self) -> None:
        """A step that changes nothing: it compiles what is to be compiled, and makes the optimisers' state."""
        self.stopped.fill_(1.0)
        try:
            self.work()
        finally:
            self.stopped.fill_(0.0)
