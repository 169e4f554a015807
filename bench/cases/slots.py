"""Case ``slots``: three iterations of slot attention with their GRU and MLP, forward and backward.

Ours folds the projections of the tokens into the slots; the others project every token once, as published, and store
the attention of each iteration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from fastslots import ops
from fastslots.bench.case import Case, Options, Provider, Run, Tensors
from fastslots.bench.cases.common import compiled, named_gradients, need
from fastslots.nn import SlotAttention

WIDTH = 64


def slots_case(options: Options) -> Case:
    """tokens [B, R·R, 64], slots [B, K, 64] -> slots, with gradients of tokens, slots and the weights."""
    config, B = options.config(), options.images()
    K, L = config.num_slots, config.resolution**2
    torch.manual_seed(0)
    module = SlotAttention(WIDTH).to(options.device)
    tokens, slots, dout = (torch.randn(B, n, WIDTH, device=options.device) for n in (L, K, K))
    inputs = {"tokens": tokens.requires_grad_(), "slots": slots.requires_grad_(), **weights(module)}

    def finish(out: Tensor) -> Tensors:
        return {"out": out, **named_gradients([out], inputs, [dout])}

    def ours(backend: str) -> Provider:
        def make() -> Run:
            served = copy.copy(module)  # the same weights
            served.backend = backend
            need(backend, "slot_attention", slots[:, None], tokens[:, None], tokens[:, None])
            return lambda: finish(served(slots, tokens))

        return Provider(make)

    def plain(slots: Tensor, tokens: Tensor) -> Tensor:
        return published(module, slots, tokens)

    def expected() -> Tensors:
        wide = copy.deepcopy(module).double()
        leaves = {
            "tokens": tokens.detach().double().requires_grad_(),
            "slots": slots.detach().double().requires_grad_(),
        }
        out = published(wide, leaves["slots"], leaves["tokens"])
        return {"out": out.detach(), **named_gradients([out], leaves | weights(wide), [dout.double()])}

    providers = {"published": Provider(lambda: lambda: finish(plain(slots, tokens)))}
    providers |= compiled(plain, lambda form: lambda: finish(form(slots, tokens)), options.device)
    providers["fused op, keys and values made"] = Provider(
        lambda: lambda: finish(published(module, slots, tokens, fused))
    )
    providers |= {"reference": ours("reference"), "fastslots, cpu": ours("cpu"), "fastslots, triton": ours("triton")}
    axes = {"B": B, "L": L, "K": K, "d": WIDTH, "iterations": module.iterations}
    return Case("slots", axes, providers, expected)


def weights(module: SlotAttention) -> Tensors:
    """Those with a gradient: the bias of the slots' norm shifts all slots' scores alike, which the softmax undoes."""
    return {name: weight for name, weight in module.named_parameters() if name != "norm_slots.bias"}


Gather = Callable[[Tensor, Tensor, Tensor, SlotAttention], Tensor]
"""q [B, K, d], k, v [B, L, d] and the module -> each slot's updates [B, K, d]."""


def stored(q: Tensor, k: Tensor, v: Tensor, module: SlotAttention) -> Tensor:
    attention = torch.einsum("bld,bkd->blk", k, q).mul(module.scale).softmax(-1) + module.eps
    return torch.einsum("blk,bld->bkd", attention / attention.sum(1, keepdim=True), v)


def fused(q: Tensor, k: Tensor, v: Tensor, module: SlotAttention) -> Tensor:
    return ops.slot_attention(q[:, None], k[:, None], v[:, None], module.scale, module.eps)[:, 0]


def published(module: SlotAttention, slots: Tensor, tokens: Tensor, gather: Gather = stored) -> Tensor:
    """Algorithm 1 of arXiv 2006.15055 in plain PyTorch with ``module``'s weights: keys and values are made once."""
    tokens = module.norm_tokens(tokens)
    k, v = module.to_k(tokens), module.to_v(tokens)
    for _ in range(module.iterations):
        updates = gather(module.to_q(module.norm_slots(slots)), k, v, module)
        slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(slots)
    return slots
