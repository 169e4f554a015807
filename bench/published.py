"""The published algorithm in eager PyTorch, from its formulas (arXiv 2411.07784): what everything is timed against.

It reads the parameters of our modules and nothing else of them, so that values and gradients compare one for one:
queries repeated over the batch, both projections applied to every pixel, one attention matrix per head kept.

    q = x Wqᵀ + bq    k, v = s Wkvᵀ + bkv    A = softmax(scale · q kᵀ)    y = (A v) Woᵀ + bo

``attend`` is the one part that peers replace: (q [B,H,L,d], k, v [B,H,K,d], scale) -> (out [B,H,L,d], A [B,H,L,K]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.models import SlotVAE
from fastslots.models.decoder import Decoder
from fastslots.models.encoder import Encoder, EncoderLayer
from fastslots.models.layers import DecoderLayer, FeedForwardLayer
from fastslots.nn import AttentionProjections

Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def stored_weights(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention as published: the weights of every head are a tensor."""
    weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    return weights @ v, weights


def penalty(weights: list[Tensor]) -> Tensor:
    """Interaction penalty of the layers' weights, N of [B, H, L, K] -> scalar."""
    slot_map = torch.stack(weights).mean(0).sum(1)
    return 0.5 * (slot_map.sum(-1).square() - slot_map.square().sum(-1)).mean()


def cross_attention(p: AttentionProjections, x: Tensor, source: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """x [B, L, Dq], source [B, K, S], both normed -> y [B, L, Dq], weights [B, H, L, K]."""
    q = p.split_heads(p.to_q(x))
    k, v = (p.split_heads(t) for t in p.to_kv(source).chunk(2, -1))
    out, weights = attend(q, k, v, p.scale)
    y: Tensor = p.to_out(out.transpose(1, 2).flatten(2))
    return y, weights


def feed_forward(x: Tensor, ff: FeedForwardLayer) -> Tensor:
    change: Tensor = ff.w2(F.gelu(ff.w1(ff.norm(x))))
    return x + change


def decoder_layer(layer: DecoderLayer, x: Tensor, slots: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """x [B, L, Dq], slots [B, K, slot_width] -> x' [B, L, Dq], weights [B, H, L, K]."""
    y, weights = cross_attention(layer.projections, layer.norm_q(x), layer.norm_slots(slots), attend)
    return feed_forward(x + y, layer.ff), weights


def decode(
    decoder: Decoder, slots: Tensor, attend: Attend = stored_weights, pixels: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """slots [B, K, D] -> pixels [B, L, C], the weights of each layer; pixels: [P], these alone."""
    hidden = decoder.slot_mlp(slots)
    code = decoder.position_code
    x = decoder.query_mlp(code if pixels is None else code[pixels]).repeat(slots.shape[0], 1, 1)
    weights = []
    for layer in cast(Iterable[DecoderLayer], decoder.transformer):
        x, of_layer = decoder_layer(layer, x, hidden, attend)
        weights.append(of_layer)
    return decoder.output_mlp(decoder.norm(x)), weights


def decoder_loss(
    decoder: Decoder, slots: Tensor, images: Tensor, sigma: float, alpha: float, attend: Attend = stored_weights
) -> tuple[Tensor, Tensor, Tensor]:
    """-> total = sigma · recon + alpha · interaction, recon, interaction."""
    pixels, weights = decode(decoder, slots, attend)
    recon = (pixels - images.flatten(2).transpose(1, 2)).square().sum() / images.shape[0]
    interaction = penalty(weights)
    return sigma * recon + alpha * interaction, recon, interaction


def encode(encoder: Encoder, images: Tensor) -> Tensor:
    """images [B, C, R, R] -> [B, K, S]; every layer norms and projects all tokens anew."""
    x = images if encoder.cnn is None else encoder.cnn(images)
    x = x.flatten(2).transpose(1, 2)
    if encoder.cnn is not None:
        x = x + encoder.position(encoder.grid)
    tokens = encoder.token_mlp(F.layer_norm(x, x.shape[1:]))
    queries = encoder.first_queries(encoder.queries, images, F.layer_norm(tokens, tokens.shape[-1:]), None)
    for layer in cast(Iterable[EncoderLayer], encoder.transformer):
        cross, among = layer.cross, layer.self_attention
        y, _ = cross_attention(cross.projections, cross.norm_q(queries), cross.norm_tokens(tokens), stored_weights)
        queries = queries + y
        qkv = among.to_qkv(among.norm(queries)).unflatten(-1, (3, among.heads, -1)).permute(2, 0, 3, 1, 4)
        out, _ = stored_weights(qkv[0], qkv[1], qkv[2], among.scale)
        queries = queries + among.to_out(out.transpose(1, 2).flatten(2))
        queries = feed_forward(queries, layer.ff)
    slots: Tensor = encoder.output(encoder.norm(queries))
    return slots


def training_loss(
    model: SlotVAE, images: Tensor, noise: Tensor, attend: Attend = stored_weights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole model's loss -> total, recon, kl, interaction; weights sigma, beta, alpha of the config."""
    config, out = model.config, encode(cast(Encoder, model.encoder), images)
    slots, kl = out, out.new_zeros(())
    if config.variational:
        mean, log_scale = out.chunk(2, -1)
        std = 0.5 * log_scale.exp()
        slots = mean + std * noise
        kl = (0.5 * (mean.square() + std.square() - 1) - std.log()).sum((1, 2)).mean()
    decoder = cast(Decoder, model.decoder)
    decoded, recon, interaction = decoder_loss(decoder, slots, images, config.sigma, config.alpha, attend)
    return decoded + config.beta * kl, recon, kl, interaction


def slot_jacobian(decoder: Decoder, slots: Tensor, directions: int | None = None) -> Tensor:
    """Σ_c Σ_d |∂x̂[c,l]/∂z[k,d]| by forward-mode derivatives, an image at a time -> [B, K, R, R].

    directions: how many of the K·D numbers of an image are pushed forward at once; None: all, which is what
    ``torch.func.jacfwd`` does.
    """
    K, D = slots.shape[1:]

    def influence(z: Tensor) -> Tensor:
        def push(direction: Tensor) -> Tensor:
            tangent = direction.view(1, K, D)
            derivative: Tensor = torch.func.jvp(lambda s: decode(decoder, s)[0][0], (z[None],), (tangent,))[1]
            return derivative  # [L, C]

        unit = torch.eye(K * D, dtype=z.dtype, device=z.device)
        jacobian = torch.func.vmap(push, chunk_size=directions)(unit)  # [K·D, L, C]
        of_slots: Tensor = jacobian.abs().sum(2).unflatten(0, (K, D))
        return of_slots.sum(1)

    with torch.no_grad():
        maps: Tensor = torch.stack([influence(z) for z in slots])
        maps = maps.unflatten(-1, (decoder.resolution, decoder.resolution))
    return maps
