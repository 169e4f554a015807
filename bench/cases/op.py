"""Case ``op``: attention and its penalty, forward and backward, with gradients of every input.

Inputs and random numbers are made outside of what is timed, here and in the other cases. ``published`` and ``peers``
hold whom ours is compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastslots import ops
from fastslots.bench import peers, published
from fastslots.bench.case import Case, Options, Provider, Run, Tensors, model_axes
from fastslots.bench.cases.common import compiled, named_gradients, need
from fastslots.ops import reference


def op_case(options: Options) -> Case:
    """cross_attention and interaction_penalty on projected q [B,H,L,d], k, v [B,H,K,d]."""
    config, B = options.config(), options.images()
    axes = model_axes(config, B)
    H, K, d, L = axes["H"], axes["K"], axes["d"], config.resolution**2
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, H, n, d, generator=generator).to(options.device, dtype) for n in (L, K, K, L))
    scale = config.query_width**-0.5
    inputs = {name: t.requires_grad_() for name, t in (("q", q), ("k", k), ("v", v))}

    def finish(out: Tensor, penalty: Tensor) -> Tensors:
        # The penalty is a mean over pixels, the output's term a sum: at this weight both shape the gradients.
        grads = named_gradients([out, penalty], inputs, [dout, penalty.new_tensor(L)])
        return {"out": out, "penalty": penalty, **grads}

    def through(attend: published.Attend) -> Callable[[], Tensors]:
        def run() -> Tensors:
            out, weights = attend(q, k, v, scale)
            return finish(out, published.penalty([weights]))

        return run

    def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = published.stored_weights(q, k, v, scale)
        return out, published.penalty([weights])

    def ours(backend: str) -> Provider:
        def make() -> Run:
            need(backend, "cross_attention", q, k, v)

            def run() -> Tensors:
                out, slot_map = ops.cross_attention(q, k, v, scale, backend)
                return finish(out, ops.interaction_penalty(slot_map))

            return run

        return Provider(make)

    def expected() -> Tensors:
        wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
        out, slot_map = reference.cross_attention(wide["q"], wide["k"], wide["v"], scale)
        penalty = reference.interaction_penalty(slot_map)
        grads = named_gradients([out, penalty], wide, [dout.double(), penalty.new_tensor(L)])
        return {"out": out.detach(), "penalty": penalty.detach(), **grads}

    providers = {"published": Provider(lambda: through(published.stored_weights))}
    providers |= compiled(eager, lambda form: lambda: finish(*form(q, k, v)), options.device)
    for name, attend in peers.ATTENTIONS.items():
        providers[name] = Provider(lambda attend=attend: through(attend))  # type: ignore[misc]
    providers["flex, two lse"] = Provider(lambda: lambda: finish(*peers.flex_two_lse(q, k, v, scale)))
    providers |= {"reference": ours("reference"), "fastslots, cpu": ours("cpu"), "fastslots, triton": ours("triton")}
    # Forward: q in, out and map out. Backward: q, dout and the map's gradient in, dq out. k and v are few.
    least = B * L * (5 * H * d * q.element_size() + 2 * K * 4)
    for provider in providers.values():
        provider.flops, provider.bytes = 14 * B * H * L * K * d, least
    return Case("op", axes, providers, expected)
