"""Images to slots: CNN (or given features) -> tokens -> Transformer whose queries become the slots."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.layers import FeedForwardLayer, grid, is_hooked, mlp, xavier_
from fastslots.models.queries import KINDS
from fastslots.nn import AttentionProjections
from fastslots.ops import backends, token_attention
from fastslots.ops.encoder import encode
from fastslots.ops.encoder_parts import bias_gelu, bias_norm, joint_norm
from fastslots.ops.parts.query_layers import encode_queries
from fastslots.ops.parts.token_mlp import token_mlp as fused_mlp
from fastslots.ops.reference import feed_forward, without_autocast
from fastslots.records import EncoderInputs, describe


class TokenAttention(nn.Module):
    """Cross-attention of few queries to many tokens, folded from the other side.

    All layers see the same tokens, so they come normalised once, without affine part (``tokens``), and each layer
    folds its own norm's affine part γ, β into its projections. With H·K rows q_hk against T tokens n_t::

        score[hk,t] = scale · (γ ∘ Wk_hᵀ q_hk) · n_t          β and the key bias only shift a row: they cancel
        out[hk]     = Wv_h (γ ∘ Σ_t A[hk,t] n_t + β) + bv_h   since the weights sum to one

    so no projection ever touches a token.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_q = nn.LayerNorm(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.projections = AttentionProjections(width, width, width, heads)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """queries [B, K, S], tokens [B, T, S] normalised without affine part -> [B, K, S], no residual."""
        p, gamma, beta = self.projections, self.norm_tokens.weight, self.norm_tokens.bias
        q = p.split_heads(p.to_q(self.norm_q(queries)))  # [B, H, K, d]
        wk, wv, bv = p.key_value_weights()
        heads = q.shape[1]
        wk, wv = wk.view(heads, -1, wk.shape[1]), wv.view(heads, -1, wv.shape[1])  # [H, d, S]
        rows = torch.einsum("bhkd,hds->bhks", q * p.scale, wk)
        gathered = token_attention((rows * gamma).flatten(1, 2).to(tokens.dtype), tokens)  # [B, H·K, S]
        gathered = gathered.unflatten(1, (heads, -1)) * gamma + beta  # [B, H, K, S]
        out = torch.einsum("bhks,hds->bkhd", gathered.to(wv.dtype), wv).flatten(2) + bv
        attended: Tensor = p.to_out(out)
        return attended


class SelfAttention(nn.Module):
    """Self-attention among the queries, scale S^-1/2 as published."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [B, K, S] -> [B, K, S], no residual."""
        width = x.shape[-1]
        # The key bias cancels in the softmax, as in AttentionProjections: its third of the bias is never read.
        bias = torch.cat([self.to_qkv.bias[:width], x.new_zeros(width), self.to_qkv.bias[2 * width :]])
        qkv = F.linear(self.norm(x), self.to_qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attn = torch.softmax((q * self.scale) @ k.transpose(-1, -2), -1)
        out: Tensor = self.to_out((attn.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Pre-norm: cross-attention to the tokens, self-attention among the queries, feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.cross = TokenAttention(width, heads)
        self.self_attention = SelfAttention(width, heads)
        self.ff = FeedForwardLayer(width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = queries + self.cross(queries, tokens)
        queries = queries + self.self_attention(queries)
        return feed_forward(queries, self.ff.weights())


class TokenEncoder(nn.Module):
    """The part that every encoder shares: images [B, 3, R, R] in [0, 1] (or features [B, C, R, R]) to tokens."""

    grid: Tensor

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        width = config.token_width
        self.cnn: nn.Sequential | None = None
        token_input = config.channels
        if config.input == "pixels":
            self.cnn = _cnn(config, width)
            token_input = width
            yx = grid(config.token_side)
            self.register_buffer("grid", torch.cat([yx, 1 - yx], -1), persistent=False)  # (y, x, 1-y, 1-x)
            self.position = nn.Linear(4, width)
        self.token_mlp = mlp(token_input, config.token_hidden or width, width)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens that every layer attends to, normalised once: [B, T, S].

        Under autocast in 16 bits: what all layers read is not cast by each of them, and not kept twice. Norms sum up in
        fp32 whatever they are given, so they too take it as it comes.
        """
        x = images
        if self.cnn is not None:
            if x.is_cuda:  # as the tensor cores' convolutions want it, and tokens then lie as they are read
                x = x.contiguous(memory_format=torch.channels_last)
            plain = x.is_cuda and not _unlike_our_cnn(self.cnn) and not any(map(is_hooked, self.cnn.modules()))
            x = convolved(x, self.cnn) if plain else self.cnn(x)
        x = joint_norm(x.flatten(2).transpose(1, 2), shared=None if self.cnn is None else self.position(self.grid))
        if x.is_cuda and _is_our_mlp(self.token_mlp) and not any(map(is_hooked, self.token_mlp.modules())):
            return normed_tokens(x, self.token_mlp)
        x = self.token_mlp(x)
        with without_autocast(x.device):
            return F.layer_norm(x, x.shape[-1:])

    def serving_backend(self, images: Tensor, backend: str = "auto") -> str:
        """Name of the backend that takes these images; plain PyTorch is "reference"."""
        return "reference"


def convolved(x: Tensor, cnn: nn.Sequential, backend: str = "auto") -> Tensor:
    """``cnn(x)`` of convolutions with GELU after each, x with channels last: bias and GELU are one pass."""
    for convolution in cast("list[nn.Conv2d]", list(cnn)[::2]):
        u = F.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)
        x = bias_gelu(u.permute(0, 2, 3, 1), cast(Tensor, convolution.bias), backend).permute(0, 3, 1, 2)
    return x


def normed_tokens(x: Tensor, token_mlp: nn.Sequential, backend: str = "auto") -> Tensor:
    """``layer_norm(token_mlp(x))`` of two linear layers with GELU between them: one kernel, or where none serves each
    bias goes with what follows it."""
    first, _, second = cast("tuple[nn.Linear, nn.GELU, nn.Linear]", tuple(token_mlp))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    tokens = fused_mlp(x, (first.weight, first.bias), (second.weight, second.bias), backend=backend)
    if tokens is not None:
        return tokens
    x = F.linear(bias_gelu(F.linear(x, first.weight), first.bias, backend), second.weight)
    with without_autocast(x.device):
        return bias_norm(x, second.bias, backend=backend)


class Encoder(TokenEncoder):
    """images [B, 3, R, R] in [0, 1] (or features [B, C, R, R]) -> [B, K, S], S = mean | log-scale, or the slots.

    query_noise: [B, K, S'], for first queries that are drawn (``fastslots.models.queries``); others leave it alone.
    """

    def __init__(self, config: SlotVAEConfig):
        super().__init__(config)
        width = config.token_width
        self.first_queries = KINDS[config.queries](config)
        self.queries = nn.Parameter(torch.rand(1, self.first_queries.rows or config.num_slots, width))
        self.transformer = nn.ModuleList(
            EncoderLayer(width, config.encoder_heads) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        xavier_(self.transformer)
        self.output: nn.Module = posterior_layer(config) if config.encoder_width else nn.Identity()

    def forward(self, images: Tensor, query_noise: Tensor | None = None, backend: str = "auto") -> Tensor:
        """backend: as of the ops; "reference" is the plain PyTorch below, which defines what a kernel gives."""
        if (name := self.serving_backend(images, backend)) != "reference":
            return encode(operator_inputs(self, images, query_noise), name)
        tokens = self.tokens(images)
        queries = self.first_queries(self.queries, images, tokens, query_noise)
        with without_autocast(images.device):  # K rows an image: 16 bits would save nothing, and cast every weight
            queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
            if images.is_cuda and backend == "auto" and not unlike_the_operator(self):
                layers = cast("list[EncoderLayer]", list(self.transformer))
                heads, of_layers = layers[0].self_attention.heads, [t for layer in layers for t in _of_layer(layer)]
                queries = encode_queries(queries, tokens, of_layers, heads, self.norm.eps)
            else:
                for layer in self.transformer:
                    queries = layer(queries, tokens)
            out: Tensor = self.output(self.norm(queries))
        return out

    def serving_backend(self, images: Tensor, backend: str = "auto") -> str:
        """Name of the backend that takes these images. ValueError where one named outright cannot."""
        changed = "" if backend == "reference" else unlike_the_operator(self)
        if changed and backend != "auto":
            raise ValueError(f"backend {backend!r} cannot serve this encoder: {changed}")
        if changed:
            return "reference"
        chain = max(len(self.transformer), len(self.cnn or ()) // 2)  # each convolution has its GELU
        return backends.select(describe("encoder", [images, *self.parameters()], chain), backend)


def posterior_layer(config: SlotVAEConfig) -> nn.Linear:
    """Token width -> what the posterior needs, the log-scales' bias at its initial value."""
    linear = nn.Linear(config.token_width, config.posterior_width)
    if config.variational and config.log_scale_bias:
        nn.init.constant_(linear.bias[config.slot_dim :].detach(), config.log_scale_bias)
    return linear


def _cnn(config: SlotVAEConfig, width: int) -> nn.Sequential:
    """Four convolutions (published: 5x5) with GELU after each; the first log2(stride) of them halve the picture."""
    halvings, C, side = int(math.log2(config.cnn_stride)), config.cnn_channels, config.cnn_kernel
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(((config.channels, C), (C, C), (C, C), (C, width))):
        layers += [nn.Conv2d(fan_in, fan_out, side, stride=2 if i < halvings else 1, padding=side // 2), nn.GELU()]
    return nn.Sequential(*layers)


# ---- as one operator -------------------------------------------------------------------------------------------------


def operator_inputs(encoder: Encoder, images: Tensor, query_noise: Tensor | None) -> EncoderInputs:
    """What the operator is handed of an encoder and its images."""
    queries, picks, seed = encoder.first_queries.before_tokens(encoder.queries, images, query_noise)
    return EncoderInputs(
        images=images,
        queries=queries,
        grid=encoder.grid if encoder.cnn else None,
        picks=picks,
        weights=operator_weights(encoder, seed),
        strides=strides(encoder),
        heads=cast(EncoderLayer, encoder.transformer[0]).self_attention.heads,
        eps=encoder.norm.eps,
    )


def strides(encoder: Encoder) -> list[int]:
    """Those of its convolutions."""
    return [module.stride[0] for module in encoder.cnn or () if isinstance(module, nn.Conv2d)]


def operator_weights(encoder: Encoder, seed: Tensor | None) -> list[Tensor]:
    """Its weights in the order of ``EncoderInputs``; seed: the weight of seeded first queries."""
    convolutions = [module for module in encoder.cnn or () if isinstance(module, nn.Conv2d)]
    maps = [module for module in encoder.token_mlp if isinstance(module, nn.Linear)]
    parts: list[nn.Module] = [*convolutions, *([encoder.position] if convolutions else []), *maps]
    weights = _weights(parts) + ([] if seed is None else [seed])
    layers = cast("list[EncoderLayer]", list(encoder.transformer))
    weights += [t for layer in layers for t in _of_layer(layer)]
    return weights + _weights([encoder.norm, *([encoder.output] if isinstance(encoder.output, nn.Linear) else [])])


def _of_layer(layer: EncoderLayer) -> list[Tensor]:
    cross, among, ff = layer.cross, layer.self_attention, layer.ff
    p = cross.projections
    parts = [cross.norm_q, cross.norm_tokens, p.to_q, p.to_kv, p.to_out, among.norm, among.to_qkv, among.to_out]
    return _weights([*parts, ff.norm, ff.w1, ff.w2])


def _weights(parts: Iterable[nn.Module]) -> list[Tensor]:
    return [t for part in parts for t in (cast(Tensor, part.weight), cast(Tensor, part.bias))]


def unlike_the_operator(encoder: Encoder) -> str:
    """Why an encoder that somebody has changed computes something else than the operator does; "" where it does not."""
    if type(encoder) is not Encoder:
        return f"it is a {type(encoder).__name__}"
    if any(map(is_hooked, encoder.modules())):
        return "a hook waits for a part of it"
    if not hasattr(encoder.first_queries, "before_tokens"):
        return f"its first queries, {type(encoder.first_queries).__name__}, do not come before the tokens"
    if not _is_our_mlp(encoder.token_mlp):
        return "its token MLP is not two linear layers with GELU between them"
    if any(type(layer) is not EncoderLayer for layer in encoder.transformer) or type(encoder.norm) is not nn.LayerNorm:
        return "its Transformer has other layers"
    if not encoder.transformer:
        return "its Transformer has no layers"
    if type(encoder.output) not in (nn.Linear, nn.Identity):
        return f"its output layer is a {type(encoder.output).__name__}"
    return "" if encoder.cnn is None else _unlike_our_cnn(encoder.cnn)


def _is_our_mlp(token_mlp: nn.Sequential) -> bool:
    return [type(module) for module in token_mlp] == [nn.Linear, nn.GELU, nn.Linear]


def _unlike_our_cnn(cnn: nn.Sequential) -> str:
    """Why a CNN is not convolutions of odd kernels, padded by half of them, with GELU after each; or ""."""
    for number, module in enumerate(cnn):
        if number % 2 and not (type(module) is nn.GELU and module.approximate == "none"):
            return f"layer {number} of its CNN is {type(module).__name__}, not the exact GELU"
        if number % 2 == 0 and type(module) is not nn.Conv2d:
            return f"layer {number} of its CNN is {type(module).__name__}, no convolution"
        if isinstance(module, nn.Conv2d):
            side = module.kernel_size[0]
            plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
            square = module.kernel_size == (side, side) and side % 2 and module.padding == (side // 2, side // 2)
            if not (plain and square and module.stride[0] == module.stride[1] <= 4 and module.bias is not None):
                return f"layer {number} of its CNN has another padding, dilation, shape or no bias"
    return "" if len(cnn) and len(cnn) % 2 == 0 else "its CNN has no layers, or ends without GELU"
