"""Weights of others: state_dicts, and the format of the authors' program.

The authors' parameter names differ from ours one for one; shapes and values are the same, so a round trip loses
nothing. Published ClevrTex weights also hold a CNN and a grid embedding that the method never reads: they are accepted
and dropped.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.errors import UserError, first_line
from fastslots.models.vae import SlotVAE

WRAPPERS = ("model_state_dict", "state_dict", "model", "teacher", "state_dict")
"""Keys of checkpoints that hold more than the weights; of DINO's teacher and student its authors use the teacher."""
PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.", "teacher.", "_forward_module.", "network.")
MOST_NAMED = 6  # keys of a message


def read_state(path: Path) -> dict[str, Tensor]:
    """Others' weights: a flat state_dict from safetensors or a ``weights_only`` torch file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise half a dozen types on bad bytes
        raise UserError(
            f"{path} cannot be read as weights ({first_line(error)}): give a state_dict (.pth or .safetensors)"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        parts = [name for name, value in state.items() if isinstance(value, dict)] if isinstance(state, dict) else []
        which = f" (its parts are {', '.join(map(str, parts))}: save one of them alone)" if parts else ""
        raise UserError(f"{path} holds no flat state_dict of tensors{which}")
    return without_prefixes(state)


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what trainers put before every name: torch.compile ``_orig_mod.``, data parallelism ``module.``, DINO and
    Lightning ``backbone.``, ``model.`` and the like, in any order; a prefix of some names alone is part of them."""
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    # A compiled part inside a model has the mark in the middle of its names.
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


# ours -> theirs, tried in order; \1 is a layer's or a module's number
_NAMES = [
    (r"encoder\.token_mlp\.(\d+)\.", r"encoder.slot_mlp.\1."),
    (r"encoder\.position\.", r"encoder.encoder_pos.embedding."),
    (r"encoder\.norm\.", r"encoder.transformer.fin_norm."),
    (r"decoder\.norm\.", r"decoder.transformer.fin_norm."),
    (r"decoder\.slot_mlp\.", r"decoder.init_mlp."),
    (r"\.transformer\.(\d+)\.", r".transformer.layers.\1."),
    (r"\.(cross\.)?projections\.to_out\.", r".cross_attn.fin_proj."),
    (r"\.(cross\.)?projections\.", r".cross_attn."),
    (r"\.(cross\.)?norm_q\.", r".norm_att_cross_q."),
    (r"\.(cross\.norm_tokens|norm_slots)\.", r".norm_att_kv."),
    (r"\.self_attention\.norm\.", r".norm_att_self_q."),
    (r"\.self_attention\.to_out\.", r".self_attn.fin_proj."),
    (r"\.self_attention\.", r".self_attn."),
    (r"\.ff\.norm\.", r".norm_ff."),
    (r"\.ff\.w([12])\.", r".feed_forward.w_\1."),
]
_UNUSED = re.compile(r"encoder\.(cnn_backbone|encoder_pos)\.")  # in published ClevrTex weights alone


def official_name(name: str) -> str:
    """The authors' name of one of our parameters."""
    convolution = re.fullmatch(r"encoder\.cnn\.(\d+)\.(\w+)", name)
    if convolution:  # every other module of the CNN is a GELU; theirs count from 1
        return f"encoder.cnn_backbone.conv{int(convolution[1]) // 2 + 1}.{convolution[2]}"
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    return name


def load_official(path: str | Path, preset: str = "clevr6", **overrides: object) -> SlotVAE:
    """A model with the weights of the authors' program.

    Args:
        path: their state_dict, ``.pth`` (read with ``weights_only``: nothing is executed) or ``.safetensors``.
        preset: the preset it was trained with; ``overrides`` change its fields (``num_slots=...``).

    Raises:
        UserError (a ValueError): a file that cannot be read, or keys that are missing, extra or of another shape.
    """
    model = SlotVAE(SlotVAEConfig.preset(preset, **overrides))
    state = read_state(Path(path))
    if model.config.input == "features":
        state = {name: value for name, value in state.items() if not _UNUSED.match(name)}
    ours = {official_name(name): name for name in model.state_dict()}
    missing, extra = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    if missing or extra:
        prefix = _prefix(missing, extra)
        mend = f": its names begin with {prefix!r}, save it without" if prefix else ""
        raise UserError(
            f"{path} does not fit preset {preset!r}{mend}: missing keys {_some(missing)}, extra {_some(extra)}"
        )
    own_shapes = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [
        f"{theirs} {list(state[theirs].shape)} (expected {list(own_shapes[name])})"
        for theirs, name in sorted(ours.items())
        if state[theirs].shape != own_shapes[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit preset {preset!r}: other shapes: {', '.join(wrong)}")
    model.load_state_dict({name: state[theirs] for theirs, name in ours.items()})
    return model


def _prefix(missing: list[str], extra: list[str]) -> str:
    """What a trainer has put before every name that is missed, where that is all; else nothing."""
    if not missing:
        return ""
    prefix = next((name for name in extra if name.endswith(missing[0])), "").removesuffix(missing[0])
    return prefix if prefix and all(prefix + name in extra for name in missing) else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return f"{names[:MOST_NAMED]}{more}" if names else "none"


def to_official(model: SlotVAE, unused_as_zeros: bool = False) -> dict[str, Tensor]:
    """The model's weights under the authors' names and shapes. UserError for what theirs cannot hold: a baseline, or an
    encoder that ends in a layer of its own (the mini presets), has other first queries or smaller convolutions.

    unused_as_zeros: for a model of features, also give zeros for the CNN and grid embedding that their ClevrTex
    program holds (and never reads), so that its strict loading succeeds.
    """
    if (model.config.encoder, model.config.decoder) != ("transformer", "transformer"):
        raise UserError(
            f"encoder {model.config.encoder!r} with decoder {model.config.decoder!r} has no place in the authors' "
            "state_dict: only 'transformer' for both has"
        )
    if model.config.encoder_width:
        raise UserError("encoder_width adds a last layer to the encoder, which has no place in the authors' state_dict")
    for field, published in (("queries", "learned"), ("cnn_kernel", 5)):
        if (value := getattr(model.config, field)) != published:
            raise UserError(f"{field} {value!r} has no place in the authors' state_dict: only {published!r} has")
    state = {official_name(name): value.detach().clone() for name, value in model.state_dict().items()}
    if unused_as_zeros and model.config.input == "features":
        C, S = model.config.cnn_channels, model.config.token_width
        shapes = {"encoder_pos.embedding.weight": (S, 4), "encoder_pos.embedding.bias": (S,)}
        for i, (fan_in, fan_out) in enumerate(((3, C), (C, C), (C, C), (C, S)), start=1):
            shapes |= {
                f"cnn_backbone.conv{i}.weight": (fan_out, fan_in, 5, 5),
                f"cnn_backbone.conv{i}.bias": (fan_out,),
            }
        state |= {f"encoder.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    return state
