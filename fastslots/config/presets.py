"""The preset table: every number of a preset stands here and nowhere else.

``sprites``, ``clevr6`` and ``clevrtex`` are the published runs (arXiv 2411.07784). ``sprites-mini`` and ``clevr6-mini``
are ours: the same method at a size that two CPU cores train in minutes, the first command and a first look at CLEVR.
Those of ``clevr6`` are for data that are not built in: their ``data`` is empty until a set is named.
Lengths of schedules are shares of the run, so that ``--steps 1000`` trains the whole recipe, shorter.
Fields that a preset leaves out keep the defaults of ``SlotVAEConfig`` and ``TrainConfig``.
"""

from __future__ import annotations

from typing import Any

# Fields that belong together stand on a line; the formatter would make columns of forty.
# fmt: off
_PAPER: dict[str, Any] = dict(
    steps=500_000, lr=5e-4, optimizer="adam", schedule="paper", alpha_warmup="5%",
    plateau_end="6%", decay_steps="100%",
)
_MINI: dict[str, Any] = dict(
    cnn_channels=32, cnn_kernel=3, encoder_width=64, encoder_layers=2, queries="seeded",
    slot_dim=32, log_scale_bias=-2.0, slot_hidden=256, decoder_heads=4, output_hidden=(64, 64), broadcast_channels=32,
    alpha=12.0, beta=0.1, batch_size=32, grad_clip=1.0, pixel_sampling="edges",
    optimizer="muon", lr=8e-3, schedule="cosine", warmup="2%",
    # From the start a penalty made slots divide the picture rather than its objects.
    alpha_start="8%", alpha_warmup="24%", beta_start="8%", beta_warmup="24%",
    eval_images=200, eval_batch=20, checkpoint_every=1_000,
)
PRESETS: dict[str, dict[str, Any]] = {
    "sprites": dict(
        _PAPER,
        resolution=64, num_slots=5, slot_dim=32, cnn_channels=32, broadcast_channels=32,
        sigma=5.0, alpha=0.05, beta=0.05, batch_size=64, warmup="2%",
    ),
    "clevr6": dict(
        _PAPER,
        resolution=128, num_slots=7, slot_dim=64, cnn_channels=64,
        sigma=1.0, alpha=0.05, beta=0.05, batch_size=32, warmup="0.5%", data="", max_objects=6,
    ),
    "clevrtex": dict(
        _PAPER,
        input="features", resolution=16, channels=768, num_slots=11, slot_dim=64,
        token_hidden=768, query_width=360, query_hidden=1440, output_hidden=(3072,),
        sigma=0.1, alpha=0.1, beta=0.1, batch_size=32, warmup="2%", schedule="paper-clevrtex", grad_clip=1.0,
    ),
    "sprites-mini": dict(
        _MINI,
        resolution=32, cnn_stride=2, num_slots=4, octaves=6, sigma=4.0, pixels_per_step=64,
        query_width=64, query_hidden=128, slot_width=64, alpha=16.0, steps=4_000, eval_every=1_000,
    ),
    "clevr6-mini": dict(
        _MINI,
        resolution=64, cnn_stride=4, num_slots=7, octaves=7, sigma=1.0, pixels_per_step=128,
        query_width=96, query_hidden=192, slot_width=96, steps=3_000, eval_every=1_000,
        # Scenes are lit unevenly, and their objects take longer to form than flat shapes.
        queries="seeded-surface", alpha_start="30%", alpha_warmup="30%",
        data="", max_objects=6,
    ),
}
# fmt: on


def preset_names() -> list[str]:
    return list(PRESETS)
