"""The modules say which of their arguments is wrong, before any kernel sees it."""

from __future__ import annotations

import pytest
import torch

from fastslots.nn import InteractionCrossAttention, SlotAttention
from fastslots.ops import cross_attention, slot_attention

CROSS = InteractionCrossAttention(query_width=16, slot_width=8, heads=4)
SLOTS = SlotAttention(width=16, token_width=24)


NARROW, WIDE = torch.randn(2, 9, 15), torch.randn(2, 9, 16)
NOT_ALL = r"must be \[B, n, {}\], got shape \[{}\]"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: InteractionCrossAttention(16, 8, 0), "heads must be at least 1, got 0"),
        (lambda: InteractionCrossAttention(16, 0, 4), "slot_width must be at least 1, got 0"),
        (lambda: InteractionCrossAttention(16, 8, 3), "inner_width 16 must be a multiple of heads 3"),
        (lambda: InteractionCrossAttention(16, 8, 4, backend="cuda"), "backend must be one of auto, reference, cpu"),
        (lambda: CROSS(NARROW, torch.randn(2, 3, 8)), "queries " + NOT_ALL.format(16, "2, 9, 15")),
        (lambda: CROSS(WIDE, torch.randn(2, 3, 7)), "slots " + NOT_ALL.format(8, "2, 3, 7")),
        (lambda: CROSS(WIDE, torch.randn(3, 3, 8)), "queries are of 2 images, slots of 3"),
        (lambda: CROSS(WIDE[0], torch.randn(3, 8)), "queries " + NOT_ALL.format(16, "9, 16")),
        (lambda: SlotAttention(0), "width must be at least 1, got 0"),
        (lambda: SlotAttention(16, token_width=0), "token_width must be at least 1, got 0"),
        (lambda: SlotAttention(16, hidden=0), "hidden must be at least 1, got 0"),
        (lambda: SlotAttention(16, iterations=0), "iterations must be at least 1, got 0"),
        (lambda: SlotAttention(16, backend="gpu"), "backend must be one of"),
        (lambda: SLOTS(WIDE, torch.randn(2, 9, 23)), "tokens " + NOT_ALL.format(24, "2, 9, 23")),
        (lambda: SLOTS(NARROW, torch.randn(2, 9, 24)), "slots " + NOT_ALL.format(16, "2, 9, 15")),
        (lambda: SLOTS(WIDE, torch.randn(3, 9, 24)), "slots are of 2 images, tokens of 3"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_queries_of_one_image_serve_all():
    out, slot_map = CROSS(torch.randn(1, 9, 16), torch.randn(3, 5, 8))
    assert out.shape == (3, 9, 16) and slot_map.shape == (3, 9, 5)


def test_default_scales_are_the_ones_that_the_docstrings_state():
    assert InteractionCrossAttention(query_width=16, slot_width=8, heads=4).projections.scale == 16**-0.5
    assert InteractionCrossAttention(16, 8, 4, scale=0.3).projections.scale == 0.3
    assert SlotAttention(width=16, token_width=24).scale == 16**-0.5
    q, k = torch.randn(1, 4, 9, 4), torch.randn(1, 4, 3, 4)  # the function knows the width of a head alone
    assert torch.equal(cross_attention(q, k, k)[0], cross_attention(q, k, k, scale=4**-0.5)[0])
    assert torch.equal(slot_attention(k, q, q), slot_attention(k, q, q, scale=4**-0.5))
