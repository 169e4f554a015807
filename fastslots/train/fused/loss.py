"""A training step's loss and gradients in one call of a kernel, where the model is as we built it.

``SlotVAE.training_loss`` and autograd are the definition, and serve everything else. The kernel takes the arrays of all
parameters once; a step then hands it the images and its random numbers, and finds the gradients in ``p.grad``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastslots.config.run import TrainConfig
from fastslots.models import SlotVAE
from fastslots.models.decoder import Decoder
from fastslots.models.encoder import Encoder, EncoderLayer, operator_weights, strides, unlike_the_operator
from fastslots.models.layers import DecoderLayer, is_hooked
from fastslots.models.queries import LearnedQueries, SeededQueries, SurfaceSeededQueries
from fastslots.ops import backends
from fastslots.records import describe
from fastslots.step_records import StepDraws, StepModel
from fastslots.train.draws import quantiles
from fastslots.train.fused.watch import Watch, have_gradients

_built: WeakKeyDictionary[SlotVAE, FusedLoss] = WeakKeyDictionary()


def fused_loss(model: SlotVAE, config: TrainConfig) -> FusedLoss | None:
    """The kernel's step of a model, its buffers the parameters' gradients; None where only the plain path gives what
    the model is."""
    if why_plain_run(config):
        return None
    step = _built.get(model)
    if step is None or not step.fits(config):
        if why_plain_model(model):
            return None
        step = _built[model] = FusedLoss(model, config)
    step.give_gradients()
    return step


def why_plain_run(config: TrainConfig) -> str:
    """Why the steps of a run take the plain path; "" where that depends on the model alone."""
    if os.environ.get("FASTSLOTS_FUSED_STEP", "1") == "0":
        return "FASTSLOTS_FUSED_STEP is 0"
    if not config.pixels_per_step:
        return "a step decodes whole images"
    if config.jacobian_weight or config.accumulate > 1 or config.model:
        return "the run has a penalty of the Jacobian, accumulates gradients or has a model of its own"
    return ""


def why_plain_model(model: SlotVAE) -> str:
    """Why this model takes the plain path; "" where the kernel computes the same."""
    if type(model) is not SlotVAE or type(model.decoder) is not Decoder:
        return f"the model is a {type(model).__name__} with a {type(model.decoder).__name__}"
    if changed := unlike_the_operator(cast(Encoder, model.encoder)):
        return f"of the encoder, {changed}"
    if type(model.encoder.first_queries) not in (LearnedQueries, SeededQueries, SurfaceSeededQueries):
        return "first queries are neither learned nor seeded"
    parameters = list(model.parameters())
    if any(map(is_hooked, model.modules())) or any(p._backward_hooks or not p.requires_grad for p in parameters):
        return "a hook waits for a part of it, or a parameter is frozen"
    if changed := _unlike_our_decoder(model.decoder):
        return changed
    if {p.dtype for p in parameters} != {torch.float32} or not all(p.is_contiguous() for p in parameters):
        return "its weights are not fp32, or not contiguous"
    call = describe("train_step", parameters)
    return "" if backends.select(call, "auto") == "cpu" else str(backends.why_not("cpu", call))


def _unlike_our_decoder(decoder: Decoder) -> str:
    for name, chain in (("slot", decoder.slot_mlp), ("query", decoder.query_mlp), ("output", decoder.output_mlp)):
        types = [type(module) for module in chain]
        if types != ([nn.Linear, nn.GELU] * len(types))[: len(types)] or len(types) % 2 == 0:
            return f"the decoder's {name} MLP is not linear layers with GELU between them"
    if len(decoder.slot_mlp) != 3:
        return "the decoder's slot MLP has not two layers"
    if any(type(layer) is not DecoderLayer for layer in decoder.transformer):
        return "the decoder's Transformer has other layers"
    return ""


class FusedLoss:
    """The kernel with the arrays of one model; gradients are written to buffers that stay."""

    def __init__(self, model: SlotVAE, config: TrainConfig):
        self._watch, self._sampling = Watch(model), config.pixel_sampling
        parameters = self._watch.parameters
        sizes = [-(-p.numel() // 16) * 16 for p in parameters]  # each begins on a line of the cache
        parts = parameters[0].new_zeros(sum(sizes)).split(sizes)
        self._grads = [part[: p.numel()].view(p.shape) for p, part in zip(parameters, parts, strict=True)]
        backend = cast(backends.StepBackend, backends.load("cpu"))
        arrays = _step_model(model, dict(zip(parameters, self._grads, strict=True)), self._sampling)
        queries = cast(Encoder, model.encoder).first_queries
        self._look = queries.tokens_and_looks if type(queries) is SurfaceSeededQueries else None
        self._step = backend.train_step(arrays, model.config.channels, model.config.resolution)

    def fits(self, config: TrainConfig) -> bool:
        """Whether nobody has changed the model since: its parts, their hooks, where its weights lie."""
        return self._sampling == config.pixel_sampling and self._watch.unchanged()

    def give_gradients(self) -> None:
        """Make the buffers the parameters' gradients: the same tensors at every step, which ``run`` writes to."""
        parameters = self._watch.parameters
        if not have_gradients(parameters, self._grads):
            for p, grad in zip(parameters, self._grads, strict=True):
                p.grad = grad

    def run(self, images: Tensor, draws: StepDraws, weights: tuple[float, float, float]) -> tuple[float, float, float]:
        """-> recon, kl and interaction, as ``StepFunction.run``; the buffers hold the gradients."""
        return self._step.run(images, draws, weights, self._look(images) if self._look else None)


def _step_model(model: SlotVAE, grads: Mapping[Tensor, Tensor], sampling: str) -> StepModel:
    """A model's arrays by the names that the kernel knows."""
    encoder, decoder = cast(Encoder, model.encoder), cast(Decoder, model.decoder)
    seeded = encoder.first_queries if isinstance(encoder.first_queries, SeededQueries) else None
    weights = operator_weights(encoder, seeded.projection.weight if seeded else None)
    named = dict(_decoder_arrays(decoder))
    arrays: dict[str, Any] = {
        "weights": [w.detach() for w in weights],
        "grads": [grads[w] for w in weights],
        "queries": encoder.queries.detach(),
        "queries_grad": grads[encoder.queries],
        "grid": encoder.grid if encoder.cnn else None,
    }
    if seeded:
        arrays |= {"places": seeded.places, "token_of": seeded.token_of}
    return StepModel(
        encoder=arrays,
        decoder={name: t.detach() for name, t in named.items()},
        grads={name: grads[t] for name, t in named.items() if t in grads},
        settings=dict(
            strides=strides(encoder),
            encoder_heads=cast(EncoderLayer, encoder.transformer[0]).self_attention.heads,
            heads=decoder.heads,
            slots=model.config.num_slots,
            scale=cast(DecoderLayer, decoder.transformer[0]).projections.scale,
            eps=decoder.norm.eps,
            variational=model.config.variational,
            patch_side=seeded.side if seeded else 0,
            favours=("uniform", "foreground", "edges").index(sampling),
        ),
        quantiles=quantiles(torch.device("cpu")),
    )


def _decoder_arrays(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Its parameters by the names of ``records.flatten``, those of the folding beside them, and the position code."""
    yield "query.code", decoder.position_code
    for name, chain in (("query", decoder.query_mlp), ("head", decoder.output_mlp)):
        for i, linear in enumerate(m for m in chain if isinstance(m, nn.Linear)):
            yield from ((f"{name}.weights.{i}", linear.weight), (f"{name}.biases.{i}", linear.bias))
    first, _, second = cast(Sequence[nn.Linear], decoder.slot_mlp)
    for i, t in enumerate((first.weight, first.bias, second.weight, second.bias)):
        yield f"slot.{i}", t
    yield from (("head.norm_weight", decoder.norm.weight), ("head.norm_bias", decoder.norm.bias))
    for i, layer in enumerate(cast(Sequence[DecoderLayer], decoder.transformer)):
        p = layer.projections
        norms, maps = {"norm_q": layer.norm_q, "norm_slots": layer.norm_slots}, {"q": p.to_q, "kv": p.to_kv}
        parts: dict[str, nn.LayerNorm | nn.Linear] = {**norms, **maps}
        for name, part in parts.items():
            yield from ((f"layers.{i}.{name}_weight", part.weight), (f"layers.{i}.{name}_bias", part.bias))
        yield from ((f"layers.{i}.out_weight", p.to_out.weight), (f"layers.{i}.b", p.to_out.bias))
        yield from ((f"layers.{i}.{name}", t) for name, t in layer.ff.weights()._asdict().items())
