"""What defines a model: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from fastslots.config.presets import PRESETS, preset_names
from fastslots.errors import UserError

Config = TypeVar("Config", bound="SlotVAEConfig")


def option(help: str, default: object) -> Any:
    """A dataclass field that carries its one line of help, which the command line shows."""
    return field(default=default, metadata={"help": help})


MOST = {
    "resolution": 4096, "octaves": 64, "encoder_layers": 1000, "decoder_layers": 1000,
    "slot_attention_iterations": 1000,
}  # fmt: skip
"""The largest values that a configuration may hold, for it may come from somebody else."""


@dataclass(frozen=True, kw_only=True)
class SlotVAEConfig:
    """Shape and loss weights of a ``SlotVAE``; the defaults are the published clevr6 model.

    Raises UserError (a ValueError) that names the field, its value and what is expected.
    """

    input: str = option(
        "what the encoder reads: 'pixels' (through a CNN) or 'features' (of a frozen network)", "pixels"
    )
    encoder: str = option("'transformer' (the method's), or 'slot-attention' (a baseline)", "transformer")
    decoder: str = option("'transformer' (the method's), or 'broadcast' (a baseline: spatial broadcast)", "transformer")
    resolution: int = option("side R of the decoded grid, in pixels", 128)
    channels: int = option("channels of the decoded image (3) or feature map", 3)
    num_slots: int = option("K, latent slots an image", 7)
    slot_dim: int = option("D, width of a slot", 64)
    cnn_channels: int = option("channels of the first three convolutions", 64)
    cnn_kernel: int = option("side of the CNN's convolutions, odd", 5)
    cnn_stride: int = option("down-sampling of the CNN: 1, 2, 4, 8 or 16; tokens form a grid of side R / stride", 1)
    encoder_width: int = option(
        "token and query width of the encoder; 0: what the slots need (2·D, or D if beta is 0)", 0
    )
    encoder_layers: int = option("layers of the encoder's Transformer", 5)
    encoder_heads: int = option("heads of the encoder's attentions", 4)
    queries: str = option(
        "the encoder's first queries: 'learned' (as published), 'seeded' (also of places that differ from the image's "
        "ground and from one another), 'seeded-surface' (the same with a ground whose colours vary smoothly) or "
        "'sampled' (from a learned Gaussian)",
        "learned",
    )
    token_hidden: int = option("hidden width of the token MLP; 0: the encoder's width", 0)
    log_scale_bias: float = option("initial bias of the log-scale; needs an explicit encoder_width", 0.0)
    slot_attention_iterations: int = option("refinements of the slots by the slot-attention encoder", 3)
    slot_attention_hidden: int = option("hidden width of its MLP; 0: twice the encoder's width", 0)
    broadcast_side: int = option("side of the grid that the broadcast decoder starts from; R over it is 2^n", 8)
    broadcast_channels: int = option("channels of the broadcast decoder's convolutions", 64)
    decoder_layers: int = option("N, layers of the decoder", 2)
    decoder_heads: int = option("H, heads of the decoder's attention", 12)
    query_width: int = option("width of a pixel query", 180)
    query_hidden: int = option("hidden width of the query MLP", 360)
    slot_width: int = option("width of a slot after the slot MLP, and of all heads together", 516)
    slot_hidden: int = option("hidden width of the slot MLP", 2064)
    output_hidden: tuple[int, ...] = option("hidden widths of the output MLP", (180, 180))
    octaves: int = option("octaves of the sin/cos position code", 8)
    sigma: float = option("weight of the reconstruction error", 1.0)
    alpha: float = option("weight of the interaction penalty", 0.05)
    jacobian_weight: float = option(
        "weight of the Jacobian's own interaction penalty (alpha's looks at attention); grows as alpha does",
        0.0,
    )
    jacobian_pixels: int = option("pixels of each image that it looks at in a step", 16)
    beta: float = option("weight of the KL term; 0 is a plain autoencoder", 0.05)

    @classmethod
    def preset(cls: type[Config], name: str, **overrides: Any) -> Config:
        """The preset ``name``, with any field overridden: ``SlotVAEConfig.preset("clevr6", num_slots=5)``.

        A ``TrainConfig`` has the name as its ``preset_name``.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: choose one of {', '.join(preset_names())}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(overrides.keys() - known):
            more = ": fields of training are those of fastslots.train.TrainConfig" if cls is SlotVAEConfig else ""
            raise UserError(f"{cls.__name__} has no field {', '.join(unknown)}{more}")
        values = {key: value for key, value in {"preset_name": name, **PRESETS[name]}.items() if key in known}
        return cls(**{**values, **overrides})

    @property
    def variational(self) -> bool:
        """Whether the encoder gives a mean and a scale; without KL (beta 0) it gives the slots."""
        return self.beta != 0

    @property
    def posterior_width(self) -> int:
        """S: 2·D (mean | log-scale) for the VAE, D for the plain autoencoder."""
        return self.slot_dim * (2 if self.variational else 1)

    @property
    def token_width(self) -> int:
        return self.encoder_width or self.posterior_width

    @property
    def token_side(self) -> int:
        """Side of the grid of tokens."""
        return self.resolution // (self.cnn_stride if self.input == "pixels" else 1)

    @property
    def patch_side(self) -> int:
        """Side of the grid of patches in which seeded queries look: twice that of the tokens, at most the image's."""
        return min(2 * self.token_side, self.resolution)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "output_hidden":
                object.__setattr__(self, f.name, _widths(value))
            elif f.type == "int" and not _whole(value):
                raise UserError(f"{f.name} must be a whole number, got {value!r}")
            elif f.type == "bool" and not isinstance(value, bool):
                raise UserError(f"{f.name} must be true or false, got {value!r}")
            elif f.type == "str" and not isinstance(value, str):
                raise UserError(f"{f.name} must be text, got {value!r}")
            elif f.type == "float":
                if not (_whole(value) or isinstance(value, float)) or value != value:
                    raise UserError(f"{f.name} must be a number, got {value!r}")
                object.__setattr__(self, f.name, float(value))
        self._check()

    def _check(self) -> None:
        self._choice("input", ("pixels", "features"))
        self._choice("encoder", ("transformer", "slot-attention"))
        self._choice("decoder", ("transformer", "broadcast"))
        self._choice("cnn_stride", (1, 2, 4, 8, 16))
        self._choice("queries", ("learned", "seeded", "seeded-surface", "sampled"))
        zero_allowed = ("encoder_width", "token_hidden", "slot_attention_hidden")
        positive = (
            "resolution", "channels", "num_slots", "slot_dim", "cnn_channels", "cnn_kernel", "encoder_layers",
            "encoder_heads", "decoder_layers", "decoder_heads", "query_width", "query_hidden", "slot_width",
            "slot_hidden", "octaves", "slot_attention_iterations", "broadcast_side", "broadcast_channels",
            "jacobian_pixels",
        )  # fmt: skip
        self._at_least(1, *positive)
        self._at_least(0, *zero_allowed, "alpha", "beta", "sigma", "jacobian_weight")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.resolution < 2:
            raise UserError(f"resolution must be at least 2, got {self.resolution}")
        if self.resolution % self.cnn_stride:
            raise UserError(f"resolution {self.resolution} must be a multiple of cnn_stride {self.cnn_stride}")
        if self.cnn_kernel % 2 == 0:
            raise UserError(f"cnn_kernel must be odd, got {self.cnn_kernel}")
        if self.queries.startswith("seeded"):
            self._check_seeds()
        if self.encoder == "transformer":
            self._check_encoder_width()
        self._divides("decoder_heads", "slot_width")
        ratio, rest = divmod(self.resolution, self.broadcast_side)
        if self.decoder == "broadcast" and (rest or ratio & (ratio - 1)):
            raise UserError(
                f"resolution {self.resolution} must be broadcast_side {self.broadcast_side} times a power of two"
            )
        if self.log_scale_bias and not self.encoder_width and self.encoder == "transformer":
            raise UserError(
                "log_scale_bias needs an explicit encoder_width (the published encoder has no output layer)"
            )

    def _check_encoder_width(self) -> None:
        if self.encoder_width:
            self._divides("encoder_heads", "encoder_width")
        elif self.posterior_width % self.encoder_heads:
            raise UserError(
                f"encoder_width 0 stands for {self.posterior_width} (slot_dim {self.slot_dim}), which must be a "
                f"multiple of encoder_heads {self.encoder_heads}: give an encoder_width that is"
            )

    def _check_seeds(self) -> None:
        if self.input != "pixels":
            looks = f"queries {self.queries!r} looks at an image's colours"
            raise UserError(f"{looks}, and features have none: choose learned")
        if self.num_slots > self.patch_side**2:
            raise UserError(
                f"queries {self.queries!r} needs a patch for each of num_slots {self.num_slots}, and resolution "
                f"{self.resolution} with cnn_stride {self.cnn_stride} has {self.patch_side**2}: ask for fewer slots"
            )

    def _choice(self, name: str, allowed: tuple[object, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise UserError(f"{name} must be at least {least} and finite, got {value}")

    def _divides(self, heads: str, width: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            raise UserError(f"{width} {getattr(self, width)} must be a multiple of {heads} {getattr(self, heads)}")


def _whole(value: object) -> bool:
    """An int of 64 bits, which every library takes; JSON has longer ones."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _widths(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(_whole(width) and width >= 1 for width in value):
        raise UserError(f"output_hidden must be a list of whole numbers from 1 on, got {value!r}")
    return tuple(value)
