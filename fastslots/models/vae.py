"""The Transformer VAE: encoder, posterior, decoder and the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.code import Code, CodeWarning, changed, check_trusted, code_of, load_code
from fastslots.config.model import SlotVAEConfig
from fastslots.errors import UserError
from fastslots.files import write_atomic
from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder
from fastslots.models.encoder import Encoder, TokenEncoder
from fastslots.models.jacobian import jacobian_penalty
from fastslots.models.outputs import LossTerms, Posterior, SlotVAEOutput, TrainingOutput
from fastslots.models.slot_attention import SlotAttentionEncoder
from fastslots.models.slot_decoder import Decoded, SlotDecoder, as_slot_decoder, no_penalty
from fastslots.ops import interaction_penalty
from fastslots.ops.reference import reconstruction_error
from fastslots.runs.folder import RunFolder
from fastslots.runs.pretrained import weights_file
from fastslots.runs.weights import model_budget, read_weights, unreadable, weights_bytes

Build = Callable[[SlotVAEConfig], "SlotVAE"]
"""What builds a model of one's own."""


class SlotVAE(nn.Module):
    """The model of *Interaction Asymmetry* (arXiv 2411.07784).

    ``config.encoder`` and ``config.decoder`` put a baseline in the place of either half; beta = 0 makes it a plain
    autoencoder, alpha = 0 an unregularised VAE.

    Loss: ``sigma · Σ(x − x̂)²/B + beta · KL + alpha · R``, R the interaction penalty of the decoder's slot map.

    Args:
        config: sizes and loss weights; what it says of an encoder or a decoder is not looked at where one is given.
        encoder: any module, images [B, C, R, R] -> [B, K, S], S = 2·D (mean | log-scale), or D (the slots) where
            beta is 0. None: the config's.
        decoder: any module, slots [B, K, D] -> image [B, C, R, R], or (image, slot_map [B, R·R, K]), in which images
            do not mix. Without a slot map there is no penalty, and alpha must be 0. A ``SlotDecoder`` brings its own
            loss and Jacobian; any other gets the generic ones, which are exact. None: the config's.

    Raises:
        UserError (a ValueError): where encoder or decoder give other shapes, at their first use.
    """

    def __init__(self, config: SlotVAEConfig, encoder: nn.Module | None = None, decoder: nn.Module | None = None):
        super().__init__()
        self.config = config
        if encoder is None:
            encoder = Encoder(config) if config.encoder == "transformer" else SlotAttentionEncoder(config)
        if decoder is None:
            decoder = Decoder(config) if config.decoder == "transformer" else BroadcastDecoder(config)
        self.encoder, self.decoder = encoder, decoder
        self.code = Code()  # what built it, where that is not this class alone

    @classmethod
    def from_run(
        cls, run: str | Path, weights: str = "best", model: Build | str | None = None, trust_code: bool = False
    ) -> SlotVAE:
        """The trained model of a run directory, in evaluation mode.

        Args:
            run: the run's folder. weights: "best" or "last".
            model: what builds a model of your own, build(config) or its name "package.module:build". None: what the
                run names, imported where this process has named it already or ``trust_code`` says so.
            trust_code: import the code that the run names.

        Raises UserError when the folder is no run, holds no weights yet, or names code that is not trusted or cannot
        be imported.
        """
        return cls.from_file(RunFolder(Path(run)).weights(weights), model, trust_code)

    @classmethod
    def from_file(cls, path: str | Path, model: Build | str | None = None, trust_code: bool = False) -> SlotVAE:
        """The model of a weights file that a run has written, in evaluation mode, on the CPU; as ``from_run``.

        Raises UserError where the file is none, or damaged, or its configuration is of a larger model than it holds;
        and as ``from_run`` does.
        """
        config, code, state = read_weights(Path(path))
        if not model and not trust_code:
            check_trusted(code.name, path)
        try:
            if callable(model):
                built = model(config)
            elif model or code.name:
                built = build_model(config, model or code.name, code.folder)
                if built.code.name == code.name and built.code.digest != code.digest:
                    warnings.warn(changed(built.code), CodeWarning, stacklevel=2)
            else:
                with model_budget(config, state):
                    built = cls(config)
            built.load_state_dict(state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise unreadable(Path(path), error) from None
        return built.eval()

    def with_slots(self, num_slots: int) -> SlotVAE:
        """The same weights with another number of slots K, in the same mode and on the same device.

        For models whose slots share one first query (``queries`` "seeded" or "sampled"): each further slot starts as
        those before it do. Raises UserError for learned queries, which are as many as the slots that were trained,
        and for a model with parts of its own, which may be made for one K.
        """
        if self.config.queries == "learned":
            raise UserError(
                f"queries 'learned' are {self.config.num_slots}, one a slot, and there are none for other slots: train "
                "with queries seeded or sampled"
            )
        if self.code.name or type(self.encoder) not in (Encoder, SlotAttentionEncoder):
            raise UserError("a model with parts of its own keeps the number of slots that it was made for")
        other = type(self)(replace(self.config, num_slots=num_slots))
        other.load_state_dict(self.state_dict())
        return other.to(next(self.parameters()).device).train(self.training)

    def weights_bytes(self, scores: dict[str, object] | None = None) -> bytes:
        """The weights, their configuration and what built the model as ``from_file`` reads them: a safetensors file.

        scores: kept too.
        """
        return weights_bytes(self.config, self.state_dict(), scores, self.code)

    @classmethod
    def from_pretrained(cls, name: str | Path, weights: str = "best") -> SlotVAE:
        """A trained model, in evaluation mode, on the CPU.

        Args:
            name: a model that ships ("sprites-mini", or "shipped:sprites-mini" where a folder has that name); a weights
                file; a run's folder, or one that ``save_pretrained`` wrote; or OWNER/NAME, a repository on the Hugging
                Face Hub that holds such a model.safetensors (extra ``hub``; kept in the Hub's own cache).
            weights: of a run's folder, "best" or "last".

        Raises UserError (a ValueError) where there is no such model, or the name means two.
        """
        return cls.from_file(weights_file(name, weights))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors into a folder, weights and configuration, as ``from_pretrained`` reads it.

        UserError where it cannot be written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror})") from None
        write_atomic(RunFolder(Path(folder)).last_weights, self.weights_bytes())

    def serving_backend(self, images: Tensor) -> str:
        """Name of the backend that serves both the encoder and the decoder's loss; "reference" where none does."""
        encoder = self.encoder.serving_backend(images) if isinstance(self.encoder, TokenEncoder) else "reference"
        return encoder if encoder == self.slot_decoder.serving_backend() else "reference"

    @property
    def slot_decoder(self) -> SlotDecoder:
        """The decoder as the package uses it: itself, or with the generic loss and Jacobian."""
        return as_slot_decoder(self.decoder)

    def encode(self, images: Tensor, noise: Tensor | None = None, query_noise: Tensor | None = None) -> Posterior:
        """images [B, C, R, R] -> z = mean + std · noise; noise [B, K, D], None draws it, zeros give the mean.

        query_noise [B, K, S]: of first queries that are sampled (S the encoder's width); None draws it in training and
        takes a fixed draw in evaluation.

        std = 0.5 · exp(s), as published, not exp(0.5 · s); KL against N(0, 1). Raises TypeError, ValueError for images
        or noise of another dtype or shape.
        """
        self._check(images)
        out = self.encoder(images) if query_noise is None else self.encoder(images, query_noise)
        expected = (len(images), self.config.num_slots, self.config.posterior_width)
        if not isinstance(out, Tensor) or tuple(out.shape) != expected:
            got = list(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            parts = "mean | log-scale" if self.config.variational else "the slots, since beta is 0"
            raise UserError(
                f"the encoder {type(self.encoder).__name__} gives {got}, expected {list(expected)} (B, K, S: {parts})"
            )
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
        kl = 0.5 * (mean.square() + std.square() - 1) - (log_scale + math.log(0.5))
        return Posterior(mean + std * noise, mean, std, kl.sum((1, 2)).sum() / max(len(mean), 1))

    def decode(self, slots: Tensor) -> Decoded:
        """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K] or None, whatever the decoder returns.

        Raises UserError where it gives other shapes, or no slot map where alpha asks for a penalty.
        """
        decoded, name = self.slot_decoder.decode(slots), type(self.decoder).__name__
        B, K, R = len(slots), slots.shape[1], self.config.resolution
        for what, value, expected, axes in (
            ("an image", decoded.recon, (B, self.config.channels, R, R), "B, C, R, R"),
            ("a slot map", decoded.slot_map, (B, R * R, K), "B, R·R, K"),
        ):
            if value is not None and tuple(value.shape) != expected:
                raise UserError(
                    f"the decoder {name} gives {what} {list(value.shape)}, expected {list(expected)} ({axes})"
                )
        if decoded.slot_map is None and self.config.alpha:
            raise UserError(no_penalty(f"the decoder {name}"))
        return decoded

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
        recon, slot_map = self.decode(z)
        interaction = kl.new_zeros(()) if slot_map is None else interaction_penalty(slot_map)
        return SlotVAEOutput(recon, z, mean, std, slot_map, kl, interaction)

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
        also: Callable[[TrainingOutput], Tensor] | None = None,
        grad_scale: float | Tensor = 1.0,
    ) -> LossTerms:
        """``loss`` of ``forward`` through the tiled decoder, and ``jacobian_weight`` times the Jacobian's penalty.

        images [B, C, R, R]; noise, query_noise as in ``encode``; alpha, beta: this step's weights (None: the config's);
        pixels, pixel_weight [B, P]: decode a weighted subset of the pixels (``Decoder.loss``), where that saves
        work.
        jacobian_weight: of the Jacobian's own penalty (``jacobian_penalty``), part of ``total`` alone; None: the
        config's, 0 costs nothing. jacobian_pixels [B, P'] int64: where it looks; None draws them.
        also: a further term of ``total`` alone; what it looks at besides the posterior is decoded once more, whole.
        """
        posterior = self.encode(images, noise, query_noise)
        z, _, _, kl = posterior
        alpha = self.config.alpha if alpha is None else alpha
        beta = self.config.beta if beta is None else beta
        decoder = self.slot_decoder
        if not decoder.decodes_pixels:  # all of them cost the same, and their loss is what a subset's estimates
            pixels = pixel_weight = None
        decoded = decoder.loss(
            z, images, self.config.sigma, alpha, pixels=pixels, pixel_weight=pixel_weight, grad_scale=grad_scale
        )
        total = decoded.total + beta * kl
        weight = self.config.jacobian_weight if jacobian_weight is None else jacobian_weight
        if weight:
            if jacobian_pixels is None:
                shape = (len(images), self.config.jacobian_pixels)
                jacobian_pixels = torch.randint(self.config.resolution**2, shape, device=images.device)
            total = total + weight * jacobian_penalty(self.decoder, z, jacobian_pixels)
        if also:
            total = total + also(TrainingOutput(self.decode, posterior))
        return LossTerms(total, decoded.recon, kl.detach(), decoded.interaction)


def build_model(config: SlotVAEConfig, name: str = "", folder: str = "") -> SlotVAE:
    """The model of a configuration: ours, or what ``package.module:build`` makes of it (see ``load_code``).

    ``build`` gets the fields of ``SlotVAEConfig`` alone, so that weights can be loaded without a run. Raises UserError
    where it gives no ``SlotVAE``, or one of another configuration.
    """
    if not name:
        return SlotVAE(config)
    build = load_code(name, folder)
    model: SlotVAE = build(SlotVAEConfig(**{f.name: getattr(config, f.name) for f in fields(SlotVAEConfig)}))
    check_model(model, config, name)
    model.code = code_of(name)
    return model


def check_model(model: object, config: SlotVAEConfig, named: str) -> None:
    """UserError where ``model`` is no SlotVAE of this configuration."""
    if not isinstance(model, SlotVAE):
        raise UserError(f"{named} gives a {type(model).__name__}, expected a SlotVAE: return SlotVAE(config, ...)")
    names = (f.name for f in fields(SlotVAEConfig))
    other = [
        f"{name} {getattr(model.config, name)!r} (the run's {getattr(config, name)!r})"
        for name in names
        if getattr(model.config, name) != getattr(config, name)
    ]
    if other:
        raise UserError(f"{named} has another configuration, {', '.join(other)}: change the run's, by flag or field")
