"""Cases of the decoder: ``op`` (attention and penalty), ``block`` (one layer), ``layer`` (a decoder training step).

All are forward and backward, with gradients of every input and weight; see ``published`` and ``peers`` for who takes
part. Inputs and random numbers are made outside of what is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from fastslots import ops
from fastslots.bench import peers, published
from fastslots.bench.case import Case, Options, Provider, Run, Tensors, model_axes
from fastslots.kernels.tools.cost import eager_cost, eager_ops
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder, DecoderLayer
from fastslots.ops import backends, reference
from fastslots.records import FoldedDecoder, describe

INTERPRETED = 1 << 19
"""Most numbers of an input that Triton's interpreter is given: what --tiny makes."""


def compiled(function: Callable, timed: Callable[[Callable], Run], device: str) -> dict[str, Provider]:
    """Providers of a function under torch.compile: default mode, and max-autotune where there are kernels to choose.

    timed: the compiled function -> what is timed. The compiler is imported when a provider is made.
    """
    forms = {"published, compiled": Provider(lambda: timed(torch.compile(function, dynamic=False)))}
    if device == "cuda":
        tuned = Provider(lambda: timed(torch.compile(function, dynamic=False, mode="max-autotune")))
        forms["published, max-autotune"] = tuned
    return forms


def need(backend: str, op: str, *tensors: Tensor) -> None:
    """CannotServeError with the backend's own reason."""
    reason = backends.why_not(backend, describe(op, tensors))
    if reason is None and backend == "triton" and tensors[0].device.type == "cpu" and tensors[0].numel() > INTERPRETED:
        reason = "Triton's interpreter shows that results are right, not how fast they come"
    if reason is not None:
        raise peers.CannotServeError(reason)


def named_gradients(outputs: Sequence[Tensor], inputs: Tensors, given: Sequence[Tensor] | None = None) -> Tensors:
    """Gradients by name, ``given`` those of the outputs (None: 1 for a scalar); zeros for what no output reaches.

    They are given rather than made by a loss: (out · dout).sum() alone takes as long as the op does.
    """
    grads = torch.autograd.grad(outputs, list(inputs.values()), given, allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(inputs.items(), grads, strict=True)
    }


# ---- op --------------------------------------------------------------------------------------------------------------


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


# ---- block -----------------------------------------------------------------------------------------------------------


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

        return Provider(make, _layer_flops(config, B, "folded"))

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
        provider.flops = _layer_flops(config, B, "published")
    providers |= {"folded": ours("reference"), "fastslots, cpu": ours("cpu"), "fastslots, triton": ours("triton")}
    return Case("block", model_axes(config, B), providers, expected)


def _layer_flops(config: SlotVAEConfig, images: int, method: str) -> float:
    D, F, H, d, K = (model_axes(config, images)[name] for name in ("D", "F", "H", "d", "K"))
    return eager_cost(eager_ops(method, D, F, H, d, K), images * config.resolution**2, element=4)[1]


# ---- layer -----------------------------------------------------------------------------------------------------------


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

    def eager(slots: Tensor, images: Tensor, attend: published.Attend = published.stored_weights):
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
        "folded, tiled": ours("reference"),
        "fastslots, cpu": ours("cpu"),
        "fastslots, triton": ours("triton"),
    }
    for provider in mine.values():
        provider.flops = decoder_flops(config, B, "folded")
    # The queries' norm has a bias whose gradient all but cancels: at tiny sizes the published algorithm is off by 0.11.
    return Case("layer", model_axes(config, B), providers | mine, expected, items=B, bounds={"bf16": 0.2})


def _compile_folded(folded: Callable, finish: Callable, slots: Tensor, images: Tensor) -> Run:
    form = torch.compile(folded, dynamic=False)
    return lambda: finish(*form(slots, images))


def decoder_flops(config: SlotVAEConfig, images: int, method: str) -> float:
    """Products of a decoder training step, forward and backward; the slots' part (K rows an image) left out."""
    pixels = config.resolution**2
    head = sum(a * b for a, b in pairwise((config.query_width, *config.output_hidden, config.channels)))
    queries = sum(a * b for a, b in pairwise((4 * config.octaves, config.query_hidden, config.query_width)))
    layers = cast(float, config.decoder_layers * _layer_flops(config, images, method))
    return layers + 6 * pixels * (images * head + queries)
