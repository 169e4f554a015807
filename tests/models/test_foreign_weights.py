"""Weights whose names others' trainers have changed: read as they are meant, or refused with what to do."""

from __future__ import annotations

import pytest
import torch

from fastslots.errors import UserError
from fastslots.interop import load_official, read_state, to_official
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.models.vit import load_vit


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return to_official(SlotVAE(SlotVAEConfig.preset("sprites")))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "model.", "teacher.backbone."]
)
def test_prefixes_of_trainers(tmp_path, state, prefix):
    torch.save({"epoch": 3, "state_dict": {prefix + name: value for name, value in state.items()}}, tmp_path / "w.pth")
    read = to_official(load_official(tmp_path / "w.pth", "sprites"))
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_a_compiled_part(tmp_path, state):
    torch.save(
        {name.replace("encoder.", "encoder._orig_mod.", 1): value for name, value in state.items()}, tmp_path / "w.pth"
    )
    assert to_official(load_official(tmp_path / "w.pth", "sprites")).keys() == state.keys()


def test_prefixes_that_are_not_known_are_named(tmp_path, state):
    torch.save({"lit.vae." + name: value for name, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"its names begin with 'lit.vae.', save it without: missing keys .* more"
    ) as error:
        load_official(tmp_path / "w.pth", "sprites")
    assert len(str(error.value)) < 1_500
    torch.save({"generator": dict(state), "discriminator": dict(state)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"its parts are generator, discriminator: save one of them alone"):
        load_official(tmp_path / "w.pth", "sprites")


def test_a_prefix_of_some_names_is_part_of_them(tmp_path):
    torch.save({"model.weight": torch.ones(1), "head.weight": torch.ones(1)}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth").keys() == {"model.weight", "head.weight"}


def test_a_checkpoint_of_dino(tmp_path):
    """What its training writes: student and teacher, each a backbone and a projection head."""
    width = 64
    vit = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 17, width),
        "norm.weight": torch.ones(width),
    }
    vit |= {"patch_embed.proj.weight": torch.randn(width, 3, 8, 8), "patch_embed.proj.bias": torch.randn(width)}
    vit |= {"norm.bias": torch.zeros(width)}
    shapes = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (128, width),
        "mlp.fc2": (width, 128),
    }
    for name, shape in shapes.items():
        vit |= {f"blocks.0.{name}.weight": torch.randn(shape), f"blocks.0.{name}.bias": torch.randn(shape[0])}
    for name in ("norm1", "norm2"):
        vit |= {f"blocks.0.{name}.weight": torch.ones(width), f"blocks.0.{name}.bias": torch.zeros(width)}
    torch.save(vit, tmp_path / "plain.pth")
    plain = load_vit(tmp_path / "plain.pth")
    head = {"head.mlp.0.weight": torch.randn(8, width), "head.last_layer.weight_v": torch.randn(8, 8)}
    teacher = {f"backbone.{name}": value for name, value in vit.items()} | head
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    for state in (
        {"student": student, "teacher": teacher, "epoch": 1},
        {"teacher": {f"module.{n}": v for n, v in teacher.items()}},
    ):
        torch.save(state, tmp_path / "full.pth")
        images = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(load_vit(tmp_path / "full.pth")(images), plain(images), rtol=0, atol=0)
