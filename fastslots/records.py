"""What a kernel is handed: records of tensors with a name for each, and the question whether a backend serves a call.

Axes: B images, H heads, L pixels, K slots, d head width, D query width, F feed-forward width, C channels, Z numbers of
a slot. A folded decoder is also a dictionary of tensors by name (``flatten``, ``unflatten``), like a ``state_dict``:
its gradients, and which of them are needed, are told by those names. Kernels import this file, which needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class FoldedProjections(NamedTuple):
    """Both projections of the pixel side, folded into the slots: K small rows an image instead of L wide ones.

    G [B, D, H, K]: score weights. g [B, H, K]: score offsets. U [B, H, K, D]: value rows, already projected out.
    b [D]: output bias.
    """

    G: Tensor
    g: Tensor
    U: Tensor
    b: Tensor

    def of_images(self, images: slice) -> FoldedProjections:
        return self._replace(G=self.G[images], g=self.g[images], U=self.U[images])


class FeedForward(NamedTuple):
    """Pre-norm feed-forward: ``x + w2 · gelu(w1 · norm(x) + b1) + b2``.

    norm_weight, norm_bias [D]; w1 [F, D]; b1 [F]; w2 [D, F]; b2 [D].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class FoldedLayer(NamedTuple):
    """One layer of a decoder: its attention, with the slots folded in, and its feed-forward."""

    folded: FoldedProjections
    ff: FeedForward


class OutputHead(NamedTuple):
    """Final norm, then linear layers with GELU between them.

    norm_weight, norm_bias [D]. weights: each [out, in]; the first has D columns, the last C rows. biases: each [out].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weights: list[Tensor]
    biases: list[Tensor]


class QueryMlp(NamedTuple):
    """The pixels' queries, to be made where they are used: linear layers with GELU between them, of position codes.

    code [L, E], without gradient. weights: each [out, in]; the first has E columns, the last D rows. biases: [out].
    """

    code: Tensor
    weights: list[Tensor]
    biases: list[Tensor]


class FoldedDecoder(NamedTuple):
    """A decoder with the slots of B images folded into its layers.

    queries [B or 1, L, D], or the ``QueryMlp`` that makes them. layers: in their order. head: of C channels.
    """

    queries: Tensor | QueryMlp
    layers: Sequence[FoldedLayer]
    head: OutputHead

    @property
    def longest_chain(self) -> int:
        """The number of its layers, or of the linear maps of its head or query MLP where those are more."""
        query_maps = 0 if isinstance(self.queries, Tensor) else len(self.queries.weights)
        return max(len(self.layers), len(self.head.weights), query_maps)


class Tangents(NamedTuple):
    """How one layer's scores and outputs follow the slots: what its slot Jacobian needs besides the folded layer."""

    query_weight: Tensor  # [H·d, D]
    query_bias: Tensor  # [H·d]
    query_norm_weight: Tensor  # [D]
    query_norm_bias: Tensor  # [D]
    out_weight: Tensor  # [D, H·d]
    keys: Tensor  # [B, K, Z, H·d] scale · ∂k/∂z
    values: Tensor  # [B, K, Z, H·d] ∂v/∂z


def flatten(decoder: FoldedDecoder) -> dict[str, Tensor]:
    """Every tensor of a decoder that may have a gradient, by a name such as ``layers.0.w1`` or ``head.weights.1``."""

    def named() -> Iterator[tuple[str, Tensor]]:
        queries, layers, head = decoder
        if isinstance(queries, Tensor):
            yield "queries", queries
        else:
            yield from _numbered("query.weights", queries.weights)
            yield from _numbered("query.biases", queries.biases)
        for i, (folded, ff) in enumerate(layers):
            for record in (folded, ff):
                yield from ((f"layers.{i}.{name}", t) for name, t in record._asdict().items())
        yield from (("head.norm_weight", head.norm_weight), ("head.norm_bias", head.norm_bias))
        yield from _numbered("head.weights", head.weights)
        yield from _numbered("head.biases", head.biases)

    return dict(named())


def _numbered(name: str, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{name}.{i}", t) for i, t in enumerate(tensors))


def unflatten(tensors: Mapping[str, Tensor], like: FoldedDecoder) -> FoldedDecoder:
    """The decoder that ``flatten`` took apart; ``like`` says how many layers and linear maps it has."""

    def numbered(name: str, old: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[f"{name}.{i}"] for i in range(len(old))]

    queries, layers, head = like
    if isinstance(queries, Tensor):
        queries = tensors["queries"]
    else:
        weights, biases = numbered("query.weights", queries.weights), numbered("query.biases", queries.biases)
        queries = QueryMlp(queries.code, weights, biases)
    layers = [
        FoldedLayer(
            FoldedProjections(*(tensors[f"layers.{i}.{name}"] for name in FoldedProjections._fields)),
            FeedForward(*(tensors[f"layers.{i}.{name}"] for name in FeedForward._fields)),
        )
        for i in range(len(layers))
    ]
    norm = tensors["head.norm_weight"], tensors["head.norm_bias"]
    head = OutputHead(*norm, numbered("head.weights", head.weights), numbered("head.biases", head.biases))
    return FoldedDecoder(queries, layers, head)


@dataclass(frozen=True)
class LossInputs:
    """What the decoder's loss is a function of. Target, pixel weights and masks carry no gradient.

    target [B, L, C] float. pixel_weight [B, L] float, or None: ones. slot_mask [B, K] bool, True for a real slot, or
    None: all are. recon_weight, interaction_weight: floats, or 0-d tensors without gradient. eps: of every layer norm.
    """

    decoder: FoldedDecoder
    target: Tensor
    pixel_weight: Tensor | None
    slot_mask: Tensor | None
    recon_weight: float | Tensor
    interaction_weight: float | Tensor
    eps: float = 1e-5

    def tensors(self) -> dict[str, Tensor]:
        """What may have a gradient, by name: ``flatten(decoder)``."""
        return flatten(self.decoder)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LossInputs:
        """The same inputs with these in the places of ``tensors()``."""
        return replace(self, decoder=unflatten(tensors, self.decoder))

    def part(self, pixels: slice, images: slice | None = None) -> LossInputs:
        """The same inputs for some pixels alone, and for some images (None: all)."""
        queries, layers, head = self.decoder
        target, weight, mask = self.target[:, pixels], self.pixel_weight, self.slot_mask
        weight = None if weight is None else weight[:, pixels]
        if isinstance(queries, QueryMlp):
            queries = queries._replace(code=queries.code[pixels])
        else:
            own = slice(None) if images is None or len(queries) == 1 else images  # one image's serve them all
            queries = queries[own, pixels]
        if images is not None:
            layers = [layer._replace(folded=layer.folded.of_images(images)) for layer in layers]
            target, weight = target[images], None if weight is None else weight[images]
            mask = None if mask is None else mask[images]
        decoder = FoldedDecoder(queries, layers, head)
        return replace(self, decoder=decoder, target=target, pixel_weight=weight, slot_mask=mask)


class LossResult(NamedTuple):
    """What a backend's ``decoder_loss`` returns: both terms unweighted, and the gradients that were asked for."""

    recon: Tensor  # scalar
    interaction: Tensor  # scalar
    grads: dict[str, Tensor]  # of grad_scale · total, by the names of ``LossInputs.tensors``


class LayerGrads(NamedTuple):
    """Gradients of a layer's input and weights; None for the records that need none."""

    x: Tensor
    folded: FoldedProjections | None
    ff: FeedForward | None


@dataclass(frozen=True)
class EncoderInputs:
    """What the operator is handed. Axes: B images, K slots, S width, T tokens.

    ``weights``, in this order, each followed by its bias unless it says otherwise: the convolutions, the position's map
    (both only with ``strides``), both maps of the token MLP, with ``picks`` the seed weight [S, S] (no bias), then of
    each layer

        cross: norm_q, norm_tokens, to_q, to_kv, to_out     self: norm, to_qkv, to_out     ff: norm, w1, w2

    then the last norm and, where there is one, the output layer.
    """

    images: Tensor  # [B, C, R, R], without gradient
    queries: Tensor  # [B or 1, K, S]
    grid: Tensor | None  # [T, 4] of the tokens' places; None where the images are features, whose pixels are the tokens
    picks: Tensor | None  # [B, K] int64: first query k is queries[k] + W · token[pick], W the seed weight
    weights: list[Tensor]
    strides: list[int]  # of the convolutions; none for features
    heads: int
    eps: float = 1e-5


class StatisticsInputs(NamedTuple):
    """What ``cross_attention`` is handed where weights of the heads or statistics of the rows are asked for."""

    q: Tensor  # [B, H, L, d]
    k: Tensor  # [B, H, K, d]
    v: Tensor  # [B, H, K, d]
    slot_mask: Tensor | None  # [B, K] bool
    head_weights: Tensor | None  # [H] of the slot map; None: ones
    scale: float
    rows: bool  # whether entropy and lse are wanted


class Statistics(NamedTuple):
    """What comes back, or the gradients of it; entropy and lse are empty where they are not wanted."""

    out: Tensor  # [B, H, L, d]
    slot_map: Tensor  # [B, L, K]
    entropy: Tensor  # [B, H, L]
    lse: Tensor  # [B, H, L]


ONE_HEAD_AT_A_TIME = ("cross_attention", "attention_statistics", "slot_attention", "folded_slot_attention")


class Call(NamedTuple):
    """A call as backends are asked about it: the op, where its tensors lie, and its sizes (1 where a size does not
    matter or is not known)."""

    op: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # of every tensor; the first is that of the rows (pixels or queries)
    images: int = 1
    width: int = 1  # numbers of a row
    heads: int = 1
    slots: int = 1
    columns: int = 1  # hidden columns of one product: heads x slots, or slots where heads are taken one at a time
    rows: int = 1  # of token_attention: heads x queries
    chain: int = 1  # ``FoldedDecoder.longest_chain``
    needs_grad: bool = False  # of the first tensor

    @property
    def one_head_at_a_time(self) -> bool:
        """Whether the op's products have the slots of one head as their columns."""
        return self.op in ONE_HEAD_AT_A_TIME


def describe(op: str, tensors: Sequence[Tensor], chain: int = 1) -> Call:
    """The call of ``op`` on its public arguments, in their order; fewer, or of other shapes, ask of what they say."""
    # Dynamo traces this, on shapes that may be dynamic: no properties, no ``_replace``.
    x = tensors[0]
    batches = [t.shape[0] for t in tensors[:2] if t.ndim]  # that of x may be 1, shared by all images
    heads, slots = 1, 1
    if op == "slot_attention":  # q [B,H,K,d]
        heads, slots = x.shape[1:3] if x.ndim == 4 else (1, 1)
    elif op == "folded_slot_attention":  # rows [B,K,S]
        slots = x.shape[1] if x.ndim == 3 else 1
    elif op not in ("token_attention", "encoder") and len(tensors) > 1 and tensors[1].ndim == 4:
        _, first, second, last = tensors[1].shape
        heads, slots = (first, second) if op in ONE_HEAD_AT_A_TIME else (second, last)  # k [B,H,K,d], G [B,D,H,K]
    return Call(
        op,
        x.device,
        tuple([t.dtype for t in tensors]),
        images=max(batches) if batches else 1,
        width=x.shape[-1] if x.ndim else 1,
        heads=heads,
        slots=slots,
        columns=slots if op in ONE_HEAD_AT_A_TIME else heads * slots,
        rows=x.shape[1] if op == "token_attention" and x.ndim == 3 else 1,
        chain=chain,
        needs_grad=x.requires_grad and torch.is_grad_enabled(),
    )


def describe_decoder(op: str, decoder: FoldedDecoder) -> Call:
    """The call of an op that takes a whole decoder."""
    dtypes = tuple(t.dtype for t in flatten(decoder).values())
    G = decoder.layers[0].folded.G
    B, D, H, K = G.shape
    chain = decoder.longest_chain
    return Call(op, G.device, dtypes, images=B, width=D, heads=H, slots=K, columns=H * K, chain=chain)
