"""Case ``map``: attention to text tokens with its map summed over heads, as diffusion models need it, and SDPA without.

K is 77, with heads of width 64: the sizes of a text encoder's tokens. One image has 96 x 96 pixels, or --resolution's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots import ops
from fastslots.bench import published
from fastslots.bench.case import Case, Options, Provider, Run, Tensors
from fastslots.bench.cases.common import compiled, named_gradients, need
from fastslots.ops import reference

HEADS, TOKENS, WIDTH, SIDE = 8, 77, 64, 96


def map_case(options: Options) -> Case:
    """q [B, H, L, d], k, v [B, H, K, d] -> out and slot_map [B, L, K], with gradients of both into q, k and v."""
    B, H, K, d = options.batch or 2, HEADS, TOKENS, WIDTH
    L = 256 if options.tiny else options.overrides.get("resolution", SIDE) ** 2
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, H, n, d, generator=generator).to(options.device, dtype) for n in (L, K, K, L))
    dmap = torch.randn(B, L, K, generator=generator).to(options.device)
    scale = d**-0.5
    inputs = {name: t.requires_grad_() for name, t in (("q", q), ("k", k), ("v", v))}

    def finish(out: Tensor, slot_map: Tensor) -> Tensors:
        grads = named_gradients([out, slot_map], inputs, [dout, dmap.to(slot_map.dtype)])
        return {"out": out, "map": slot_map, **grads}

    def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = published.stored_weights(q, k, v, scale)
        return out, weights.sum(1)

    def sdpa() -> Run:
        def run() -> Tensors:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
            return {"out": out, **named_gradients([out], inputs, [dout])}

        return run

    def ours(backend: str) -> Provider:
        def make() -> Run:
            need(backend, "cross_attention", q, k, v)
            return lambda: finish(*ops.cross_attention(q, k, v, scale, backend))

        return Provider(make)

    def expected(with_map: bool = True) -> Callable[[], Tensors]:
        def make() -> Tensors:
            wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
            out, slot_map = reference.cross_attention(wide["q"], wide["k"], wide["v"], scale)
            outputs, given = ([out, slot_map], [dout.double(), dmap.double()]) if with_map else ([out], [dout.double()])
            values = {"out": out.detach(), "map": slot_map.detach()} if with_map else {"out": out.detach()}
            return {**values, **named_gradients(outputs, wide, given)}

        return make

    providers = {"published": Provider(lambda: lambda: finish(*eager(q, k, v)))}
    providers |= compiled(eager, lambda form: lambda: finish(*form(q, k, v)), options.device)
    providers["sdpa, without a map"] = Provider(sdpa, expected=expected(with_map=False))
    providers |= {"reference": ours("reference"), "fastslots, cpu": ours("cpu"), "fastslots, triton": ours("triton")}
    for provider in providers.values():
        provider.flops = 14 * B * H * L * K * d
    return Case("map", {"B": B, "L": L, "K": K, "H": H, "d": d}, providers, expected())
