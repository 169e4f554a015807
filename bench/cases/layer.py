"""Case ``block``: one layer of the decoder, forward and backward, with gradients of every input and weight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastslots import ops
from fastslots.bench import peers, published
from fastslots.bench.case import Case, Options, Provider, Run, Tensors, model_axes
from fastslots.bench.cases.common import compiled, named_gradients, need
from fastslots.kernels.tools.eager import eager_cost, eager_ops
from fastslots.models import SlotVAEConfig
from fastslots.models.layers import DecoderLayer
from fastslots.ops import reference


def block_case(options: Options) -> Case:
    """One decoder layer from the second on (queries differ between images): norm, attention, residual, feed-forward."""
    config, B = options.config(), options.images()
    torch.manual_seed(0)
    layer = DecoderLayer(config).to(options.device)
    L, D = config.resolution**2, config.query_width
    x, dy = torch.randn(2, B, L, D).to(options.device)
    slots = torch.randn(B, config.num_slots, config.slot_width).to(options.device)
    inputs = {"x": x.requires_grad_(), "slots": slots.requires_grad_(), **dict(layer.named_parameters())}

    def finish(y: Tensor, penalty: Tensor) -> Tensors:
        grads = named_gradients([y, penalty], inputs, [dy, penalty.new_tensor(L)])
        return {"y": y, "penalty": penalty, **grads}

    def eager(x: Tensor, slots: Tensor, attend: published.Attend = published.stored_weights) -> tuple[Tensor, Tensor]:
        y, weights = published.decoder_layer(layer, x, slots, attend)
        return y, published.penalty([weights])

    def ours(backend: str) -> Provider:
        def make() -> Run:
            need(backend, "decoder_layer", x, *layer.fold(slots), *layer.ff.weights())

            def run() -> Tensors:
                y, slot_map = ops.decoder_layer(x, layer.fold(slots), layer.ff.weights(), backend)
                return finish(y, ops.interaction_penalty(slot_map))

            return run

        return Provider(make, layer_flops(config, B, "folded"))

    def expected() -> Tensors:
        wide = copy.deepcopy(layer).double()
        x64, slots64 = (t.detach().double().requires_grad_() for t in (x, slots))
        y, slot_map = reference.decoder_layer(x64, wide.fold(slots64), wide.ff.weights())
        penalty = reference.interaction_penalty(slot_map)
        named = {"x": x64, "slots": slots64, **dict(wide.named_parameters())}
        grads = named_gradients([y, penalty], named, [dy.double(), penalty.new_tensor(L)])
        return {"y": y.detach(), "penalty": penalty.detach(), **grads}

    providers = {"published": Provider(lambda: lambda: finish(*eager(x, slots)))}
    providers |= compiled(eager, lambda form: lambda: finish(*form(x, slots)), options.device)
    for name, attend in peers.ATTENTIONS.items():
        providers[name] = Provider(lambda attend=attend: lambda: finish(*eager(x, slots, attend)))  # type: ignore[misc]
    for provider in providers.values():
        provider.flops = layer_flops(config, B, "published")
    providers |= {"folded": ours("reference"), "fastslots, cpu": ours("cpu"), "fastslots, triton": ours("triton")}
    return Case("block", model_axes(config, B), providers, expected)


def layer_flops(config: SlotVAEConfig, images: int, method: str) -> float:
    D, F, H, d, K = (model_axes(config, images)[name] for name in ("D", "F", "H", "d", "K"))
    return eager_cost(eager_ops(method, D, F, H, d, K), images * config.resolution**2, element=4)[1]
