"""Weights files that are small and claim much: refused before anything is allocated for them."""

from __future__ import annotations

import json
import os
import resource

import pytest
from safetensors.torch import load, save
from tiny import MODEL_8

from fastslots.errors import UserError
from fastslots.models import SlotVAE, SlotVAEConfig

SMALL = SlotVAEConfig.preset(
    "sprites-mini", **{name: value for name, value in MODEL_8.items() if name != "pixels_per_step"}
)


def peak() -> int:
    """Bytes: the most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize(
    "claims, words",
    [
        ({"slot_hidden": 1 << 20, "slot_width": 1 << 10}, "of a larger model than it has weights for"),
        ({"query_width": 1 << 15, "query_hidden": 1 << 15}, "of a larger model than it has weights for"),
        ({"output_hidden": [40_000, 40_000]}, "of a larger model than it has weights for"),
        ({"cnn_channels": 1 << 13}, "of a larger model than it has weights for"),
        ({"num_slots": 1 << 30, "queries": "learned"}, "of a larger model than it has weights for"),
        ({"encoder_layers": 1_000}, "of a larger model than it has weights for"),
        ({"encoder_layers": 10**9}, "encoder_layers must be at most 1000"),
        ({"resolution": 4096, "octaves": 8}, "resolution 4096 with 8 octaves takes tables of 2,684,354,560 bytes"),
        ({"resolution": 1 << 16}, "resolution must be at most 4096"),
        ({"resolution": 2048, "octaves": 64}, "resolution 2048 with 64 octaves takes tables of"),
        (
            {"decoder": "broadcast", "broadcast_side": 1, "broadcast_channels": 1 << 12},
            "of a larger model than it has weights for",
        ),
        ({"encoder": "slot-attention", "slot_attention_hidden": 1 << 28}, "of a larger model than it has weights for"),
    ],
)
def test_a_small_file_allocates_no_large_model(tmp_path, claims, words):
    data = SlotVAE(SMALL).weights_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    config = json.loads(metadata["fastslots.config"]) | claims
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(load(data), {"fastslots.config": json.dumps(config)}))
    assert path.stat().st_size < 30_000
    before = peak()
    with pytest.raises(UserError, match=f"^{path}: .*{words}.*: |{words}"):
        SlotVAE.from_file(path)
    assert peak() - before < 256 << 20


def test_models_of_every_preset_are_within_the_budget(tmp_path):
    for name in ("sprites", "clevr6", "clevrtex", "sprites-mini", "clevr6-mini"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(SlotVAE(SlotVAEConfig.preset(name)).weights_bytes())
        SlotVAE.from_file(path)
    for changes in ({"encoder": "slot-attention", "decoder": "broadcast"}, {"queries": "seeded"}, {"resolution": 256}):
        path.write_bytes(SlotVAE(SlotVAEConfig.preset("sprites-mini", **changes)).weights_bytes())
        SlotVAE.from_file(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "folder", "gone", "sparse"])
def test_what_is_no_file_is_one_line(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"cannot be read as weights"):
        SlotVAE.from_file(path)
