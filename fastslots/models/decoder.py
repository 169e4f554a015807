"""Slots to images: every pixel is a query that attends to the slots. A pixel never attends to a pixel."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.decoder_jacobian import transformer_jacobian
from fastslots.models.layers import DecoderLayer, grid, mlp, rows_at, xavier_
from fastslots.models.slot_decoder import JacobianRequest, SlotDecoder, check_loss, check_slots
from fastslots.ops import backends, checks, decoder_layer
from fastslots.ops.backends import is_traced
from fastslots.ops.decoder_loss import DecoderLossTerms, decoder_loss
from fastslots.ops.reference import output_head, real_slots, without_autocast
from fastslots.records import FoldedDecoder, FoldedLayer, LossInputs, OutputHead, QueryMlp, describe

CACHED_ROWS = 1024


class Decoder(SlotDecoder):
    """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K] (sum over heads, mean over layers)."""

    any_slots = decodes_pixels = True

    position_code: Tensor

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.resolution, self.channels, self.slot_dim = config.resolution, config.channels, config.slot_dim
        self.heads = config.decoder_heads
        self.slot_mlp = mlp(config.slot_dim, config.slot_hidden, config.slot_width)
        self.query_mlp = mlp(4 * config.octaves, config.query_hidden, config.query_width)
        self.transformer = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.query_width)
        self.output_mlp = mlp(config.query_width, *config.output_hidden, config.channels)
        self.register_buffer("position_code", position_code(config.resolution, config.octaves), persistent=False)
        xavier_(self.transformer)

    def queries(self) -> Tensor:
        """The pixels' queries, the same for every image: [1, L, query_width]."""
        return _by_rows(self.query_mlp, self.position_code)[None]

    def _queries_at(self, pixels: Tensor) -> Tensor:
        """Queries of each image's own pixels, [B, P] int64 -> [B, P, query_width]: by whichever is less work."""
        code = self.position_code
        return self.query_mlp(code[pixels]) if pixels.numel() < len(code) else rows_at(self.queries()[0], pixels)

    def layers(self, slots: Tensor) -> list[FoldedLayer]:
        """What each layer needs to know of the slots and of its weights; K rows an image, in fp32."""
        if slots.ndim != 3 or slots.shape[2] != self.slot_dim:
            raise ValueError(f"slots has shape {list(slots.shape)}, expected [B, K, {self.slot_dim}]")
        with without_autocast(slots.device):
            hidden = self.slot_mlp(slots.to(self.norm.weight.dtype))
            layers = cast(Iterable[DecoderLayer], self.transformer)
            return [FoldedLayer(layer.fold(hidden), layer.ff.weights()) for layer in layers]

    def head(self) -> OutputHead:
        return OutputHead(self.norm.weight, self.norm.bias, *_linear_maps(self.output_mlp))

    def forward(self, slots: Tensor, slot_mask: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K]; slot_mask [B, K] bool, True = a real slot.

        backend: of its layers; "reference" for what must consist of torch's own operators (an export).
        """
        (slots,) = real_slots(slot_mask, 1, slots)
        x, maps = self.queries(), []
        for folded, ff in self.layers(slots):
            x, slot_map = decoder_layer(x, folded, ff, backend, slot_mask=slot_mask, eps=self.norm.eps)
            maps.append(slot_map)
        head = self.head()
        pixels = _by_rows(lambda rows: output_head(rows, head, self.norm.eps), x)
        recon = pixels.transpose(1, 2).unflatten(-1, (self.resolution, self.resolution))
        return recon, torch.stack(maps).mean(0)

    def loss(
        self,
        slots: Tensor,
        images: Tensor,
        recon_weight: float | Tensor,
        interaction_weight: float | Tensor,
        *,
        pixels: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        slot_mask: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        backend: str = "auto",
    ) -> DecoderLossTerms:
        """``SlotDecoder.loss``, forward and backward tile by tile (``fastslots.ops.decoder_loss``).

        Weights must be known on the way forward. ``pixels`` decodes these alone, each image's own.
        """
        B, R = slots.shape[0], self.resolution
        check_loss(slots, images, R * R, pixels, pixel_weight, slot_mask)
        checks.shape("images", images, (B, self.channels, R, R), "(B of slots, C, R, R)")
        (slots,) = real_slots(slot_mask, 1, slots)
        target = images.flatten(2).transpose(1, 2)
        expansion = 1.0  # the error is a sum over all pixels, of which P are seen; the penalty is a mean
        queries: Tensor | QueryMlp = QueryMlp(self.position_code, *_linear_maps(self.query_mlp))
        if pixels is not None:
            expansion = R * R / pixels.shape[1]
            queries = self._queries_at(pixels)
            target = target.gather(1, pixels[..., None].expand(-1, -1, self.channels))
        inputs = LossInputs(
            decoder=FoldedDecoder(queries, self.layers(slots), self.head()),
            target=target,
            pixel_weight=pixel_weight,
            slot_mask=slot_mask,
            recon_weight=recon_weight * expansion,
            interaction_weight=interaction_weight,
            eps=self.norm.eps,
        )
        terms = decoder_loss(inputs, grad_scale, backend)
        return terms._replace(recon=terms.recon * expansion)

    def serving_backend(self) -> str:
        weight = self.norm.weight
        return backends.select(describe("decoder_loss", [weight.new_empty(1)]), "auto")

    def jacobian(self, slots: Tensor, request: JacobianRequest) -> Tensor:
        """``SlotDecoder.jacobian`` in C backward passes (``decoder_jacobian.py``), or by a kernel."""
        check_slots(slots, request.slot_mask, self.slot_dim)
        (slots,) = real_slots(request.slot_mask, 1, slots)
        jacobian = transformer_jacobian(self, slots, request)
        return jacobian if request.pixels is not None else jacobian.unflatten(2, (self.resolution, self.resolution))

    def thinned(self, stride: int) -> Decoder:
        """A copy for every ``stride``-th pixel: left out, not moved. Between the pixels that it was trained on a
        decoder shows artefacts, since its highest octave alternates from one to the next."""
        if stride == 1:
            return self
        thin, side = copy.deepcopy(self), (self.resolution, self.resolution)
        code = self.position_code.unflatten(0, side)[::stride, ::stride]
        thin.resolution, thin.position_code = code.shape[0], code.flatten(0, 1)
        return thin

    def multiplications(self, slots: Tensor) -> int:
        # A pixel meets each weight once.
        return len(slots) * self.resolution**2 * sum(w.numel() for w in self.parameters())


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, which treats all rows [..., width] alike.

    On a CPU and without gradients, part by part: hidden layers stay in cache (clevr6's queries take 41 ms, not 65) and
    never exist for all rows.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or is_traced():
        return function(x)
    parts = [function(part) for part in x.flatten(0, -2).split(CACHED_ROWS)]
    out: Tensor = torch.cat(parts).unflatten(0, x.shape[:-1])
    return out


def _linear_maps(mlp: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of an MLP's linear layers."""
    linears = [module for module in mlp if isinstance(module, nn.Linear)]
    return [m.weight for m in linears], [m.bias for m in linears]


def position_code(resolution: int, octaves: int) -> Tensor:
    """sin(y), sin(x), cos(y), cos(x) at frequencies 2^o·π of (y, x) in [0, 1]: [R·R, 4·octaves] fp32."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves)
    angles = (grid(resolution)[:, :, None] * frequencies).flatten(1)  # y's octaves, then x's
    return torch.cat([angles.sin(), angles.cos()], -1)
