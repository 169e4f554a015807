"""The Transformer VAE: encoder, posterior, decoder and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder
from fastslots.models.decoder_jacobian import jacobian_penalty
from fastslots.models.encoder import Encoder
from fastslots.models.slot_attention import SlotAttentionEncoder
from fastslots.ops import interaction_penalty
from fastslots.ops.reference import reconstruction_error


class Posterior(NamedTuple):
    """A diagonal Gaussian per slot, and a draw from it; all [B, K, D]."""

    slots: Tensor
    mean: Tensor
    std: Tensor
    kl: Tensor  # scalar: summed over slots and width, mean over the batch


class SlotVAEOutput(NamedTuple):
    """What ``SlotVAE.forward`` returns."""

    recon: Tensor  # [B, C, R, R]
    slots: Tensor  # [B, K, D], z
    mean: Tensor  # [B, K, D]
    std: Tensor  # [B, K, D], zeros for the plain autoencoder
    slot_map: Tensor  # [B, R·R, K], sum over heads, mean over layers
    kl: Tensor  # scalar
    interaction: Tensor  # scalar


class LossTerms(NamedTuple):
    """Scalars: ``total`` is the weighted sum and the only one with a gradient; the others unweighted and detached."""

    total: Tensor
    recon: Tensor
    kl: Tensor
    interaction: Tensor


class SlotVAE(nn.Module):
    """The model of *Interaction Asymmetry* (arXiv 2411.07784).

    ``config.encoder`` and ``config.decoder`` put a baseline in the place of either half; beta = 0 makes it a plain
    autoencoder, alpha = 0 an unregularised VAE.

    Loss: ``sigma · Σ(x − x̂)²/B + beta · KL + alpha · R``, R the interaction penalty of the decoder's slot map.
    """

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.encoder == "transformer" else SlotAttentionEncoder(config)
        self.decoder = Decoder(config) if config.decoder == "transformer" else BroadcastDecoder(config)

    @classmethod
    def from_run(cls, run: str | Path, weights: str = "best") -> SlotVAE:
        """The trained model of a run directory, in evaluation mode; ``weights``: "best" or "last".

        Raises UserError when the folder is no run, or holds no weights yet.
        """
        from fastslots.models.weights import load_run

        return load_run(Path(run), weights)

    def encode(self, images: Tensor, noise: Tensor | None = None, query_noise: Tensor | None = None) -> Posterior:
        """images [B, C, R, R] -> z = mean + std · noise; noise [B, K, D], None draws it, zeros give the mean.

        query_noise [B, K, S]: of first queries that are sampled (S the encoder's width); None draws it in training and
        takes a fixed draw in evaluation.

        std = 0.5 · exp(s), as published, not exp(0.5 · s); KL against N(0, 1). Raises TypeError, ValueError for images
        or noise of another dtype or shape.
        """
        self._check(images)
        out = self.encoder(images, query_noise)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if not self.config.variational:
            return Posterior(out, out, torch.zeros_like(out), out.new_zeros(()))
        mean, log_scale = out.chunk(2, -1)
        std = 0.5 * log_scale.exp()
        if noise is None:
            noise = torch.randn_like(mean)
        elif noise.shape != mean.shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, expected {list(mean.shape)} (B, K, D)")
        # log std = log_scale + log 0.5 exactly: the logarithm of exp() would overflow before it.
        kl = 0.5 * (mean.square() + std.square() - 1) - (log_scale + torch.log(log_scale.new_tensor(0.5)))
        return Posterior(mean + std * noise, mean, std, kl.sum((1, 2)).sum() / max(len(mean), 1))

    def _check(self, images: Tensor) -> None:
        C, R = self.config.channels, self.config.resolution
        if not images.is_floating_point():
            raise TypeError(
                f"images must be float in [0, 1], got {images.dtype}: fastslots.data.to_float converts them"
            )
        if images.ndim != 4 or tuple(images.shape[1:]) != (C, R, R):
            raise ValueError(f"images has shape {list(images.shape)}, expected [B, {C}, {R}, {R}]")

    def forward(self, images: Tensor, noise: Tensor | None = None) -> SlotVAEOutput:
        """images (or features) [B, C, R, R] -> reconstruction, slots, posterior, slot map and both regularisers."""
        z, mean, std, kl = self.encode(images, noise)
        recon, slot_map = self.decoder(z)
        return SlotVAEOutput(recon, z, mean, std, slot_map, kl, interaction_penalty(slot_map))

    def loss(self, result: SlotVAEOutput, images: Tensor, alpha: float | Tensor | None = None) -> LossTerms:
        """The loss of a ``forward``, for evaluation and for tests of the tiled path."""
        recon = reconstruction_error(result.recon.flatten(2).transpose(1, 2), images.flatten(2).transpose(1, 2))
        alpha = self.config.alpha if alpha is None else alpha
        total = self.config.sigma * recon + self.config.beta * result.kl + alpha * result.interaction
        return LossTerms(total, recon.detach(), result.kl.detach(), result.interaction.detach())

    def training_loss(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        alpha: float | Tensor | None = None,
        *,
        beta: float | Tensor | None = None,
        query_noise: Tensor | None = None,
        pixels: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        jacobian_weight: float | None = None,
        jacobian_pixels: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
    ) -> LossTerms:
        """``loss`` of ``forward`` through the tiled decoder, and ``jacobian_weight`` times the Jacobian's penalty.

        images [B, C, R, R]; noise, query_noise as in ``encode``; alpha, beta: this step's weights (None: the config's);
        pixels, pixel_weight [B, P]: decode a weighted subset of the pixels (``Decoder.loss``).
        jacobian_weight: of the Jacobian's own penalty (``jacobian_penalty``), part of ``total`` alone; None: the
        config's, 0 costs nothing. jacobian_pixels [B, P'] int64: where it looks; None draws them.
        """
        z, _, _, kl = self.encode(images, noise, query_noise)
        alpha = self.config.alpha if alpha is None else alpha
        beta = self.config.beta if beta is None else beta
        decoded = self.decoder.loss(
            z, images, self.config.sigma, alpha, pixels=pixels, pixel_weight=pixel_weight, grad_scale=grad_scale
        )
        total = decoded.total + beta * kl
        weight = self.config.jacobian_weight if jacobian_weight is None else jacobian_weight
        if weight:
            if jacobian_pixels is None:
                shape = (len(images), self.config.jacobian_pixels)
                jacobian_pixels = torch.randint(self.config.resolution**2, shape, device=images.device)
            total = total + weight * jacobian_penalty(self.decoder, z, jacobian_pixels)
        return LossTerms(total, decoded.recon, kl.detach(), decoded.interaction)
