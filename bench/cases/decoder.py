"""Case ``layer``: a training step of the decoder, with gradients of the slots and of every weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from fastslots.bench import peers, published
from fastslots.bench.case import Case, Options, Provider, Run, Tensors, model_axes
from fastslots.bench.cases.common import compiled, named_gradients, need
from fastslots.bench.cases.layer import layer_flops
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder
from fastslots.ops import reference
from fastslots.records import FoldedDecoder

Loss = tuple[Tensor, Tensor, Tensor]
"""Total, reconstruction error and interaction penalty."""


def layer_case(options: Options) -> Case:
    """A decoder training step: slots to loss and back to every weight and to the slots."""
    config, B = options.config(), options.images()
    torch.manual_seed(0)
    decoder = Decoder(config).to(options.device)
    slots = torch.randn(B, config.num_slots, config.slot_dim).to(options.device).requires_grad_()
    images = torch.rand(B, config.channels, config.resolution, config.resolution).to(options.device)
    sigma, alpha = config.sigma, config.alpha
    inputs: Tensors = {"slots": slots, **dict(decoder.named_parameters())}

    def finish(total: Tensor, recon: Tensor, interaction: Tensor) -> Tensors:
        return {"recon": recon, "interaction": interaction, **named_gradients([total], inputs)}

    def eager(slots: Tensor, images: Tensor, attend: published.Attend = published.stored_weights) -> Loss:
        return published.decoder_loss(decoder, slots, images, sigma, alpha, attend)

    def folded(slots: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels, slot_map = reference.decode(FoldedDecoder(decoder.queries(), decoder.layers(slots), decoder.head()))
        recon = reference.reconstruction_error(pixels, images.flatten(2).transpose(1, 2))
        interaction = reference.interaction_penalty(slot_map)
        return sigma * recon + alpha * interaction, recon, interaction

    def ours(backend: str) -> Provider:
        def make() -> Run:
            folded, ff = decoder.layers(slots)[0]
            need(backend, "decoder_loss", decoder.queries(), *folded, *ff)
            return lambda: finish(*decoder.loss(slots, images, sigma, alpha, backend=backend))

        return Provider(make)

    def expected() -> Tensors:
        wide = copy.deepcopy(decoder).double()
        named: Tensors = {"slots": slots.detach().double().requires_grad_(), **dict(wide.named_parameters())}
        terms = wide.loss(named["slots"], images.double(), sigma, alpha, backend="reference")
        return {"recon": terms.recon, "interaction": terms.interaction, **named_gradients([terms.total], named)}

    providers = {"published": Provider(lambda: lambda: finish(*eager(slots, images)))}
    providers |= compiled(eager, lambda form: lambda: finish(*form(slots, images)), options.device)
    for name, attend in peers.ATTENTIONS.items():
        providers[name] = Provider(
            lambda attend=attend: lambda: finish(*eager(slots, images, attend))  # type: ignore[misc]
        )
    for provider in providers.values():
        provider.flops = decoder_flops(config, B, "published")
    mine = {
        "folded": Provider(lambda: lambda: finish(*folded(slots, images))),
        "folded, compiled": Provider(lambda: _compile_folded(folded, finish, slots, images)),
        **(
            {"folded, max-autotune": Provider(lambda: _compile_folded(folded, finish, slots, images, "max-autotune"))}
            if options.device == "cuda"
            else {}
        ),
        "folded, tiled": ours("reference"),
        "fastslots, cpu": ours("cpu"),
        "fastslots, triton": ours("triton"),
    }
    for provider in mine.values():
        provider.flops = decoder_flops(config, B, "folded")
    # The queries' norm has a bias whose gradient all but cancels: at tiny sizes the published algorithm is off by 0.11.
    return Case("layer", model_axes(config, B), providers | mine, expected, items=B, bounds={"bf16": 0.2})


def _compile_folded(
    folded: Callable[..., Loss], finish: Callable[..., Tensors], slots: Tensor, images: Tensor, mode: str = "default"
) -> Run:
    form = torch.compile(folded, dynamic=False, mode=mode)
    return lambda: finish(*form(slots, images))


def decoder_flops(config: SlotVAEConfig, images: int, method: str) -> float:
    """Products of a decoder training step, forward and backward; the slots' part (K rows an image) left out."""
    pixels = config.resolution**2
    head = sum(a * b for a, b in pairwise((config.query_width, *config.output_hidden, config.channels)))
    queries = sum(a * b for a, b in pairwise((4 * config.octaves, config.query_hidden, config.query_width)))
    layers = config.decoder_layers * layer_flops(config, images, method)
    return layers + 6 * pixels * (images * head + queries)
