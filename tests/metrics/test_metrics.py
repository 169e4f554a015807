"""ARI, overlaps, J-ARI and JIS: against scikit-learn, by hand, and in every corner."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

import fastslots.metrics.rand_index as rand_index
from fastslots.metrics import (
    JacobianMeter,
    SegmentationMeter,
    adjusted_rand_index,
    ari,
    fg_ari,
    jacobian_ari,
    jacobian_interaction_score,
    mean_best_overlap,
    mean_iou,
)


def labels(*rows) -> torch.Tensor:
    return torch.tensor(rows)


# --- adjusted Rand index


@pytest.mark.parametrize("clusters", [1, 2, 5, 40])
@pytest.mark.parametrize("foreground_only", [False, True])
@pytest.mark.parametrize("dense_cells", [1, rand_index.DENSE_CELLS], ids=["sorted", "dense"])
def test_ari_against_scikit_learn(monkeypatch, clusters, foreground_only, dense_cells):
    monkeypatch.setattr(rand_index, "DENSE_CELLS", dense_cells)
    g = torch.Generator().manual_seed(clusters)
    true = torch.randint(0, clusters, (6, 9, 11), generator=g)
    pred = torch.where(torch.rand(true.shape, generator=g) < 0.6, true, torch.randint(0, 7, true.shape, generator=g))
    scores = adjusted_rand_index(true, pred, foreground_only)
    assert scores.shape == (6,) and scores.dtype == torch.float64
    for image, score in enumerate(scores):
        keep = true[image] > 0 if foreground_only else torch.ones_like(true[image], dtype=torch.bool)
        expected = adjusted_rand_score(true[image][keep], pred[image][keep]) if keep.any() else 1.0
        assert abs(score.item() - expected) < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_ari_of_any_small_labeling(pairs):
    true, pred = torch.tensor(pairs).T
    score = adjusted_rand_index(true[None], pred[None]).item()
    assert abs(score - adjusted_rand_score(true, pred)) < 1e-12
    assert -0.5 <= score <= 1
    # symmetric, and blind to names, however far apart
    assert adjusted_rand_index(pred[None], true[None]).item() == pytest.approx(score)
    assert adjusted_rand_index(true[None] * 10**15, pred[None] + 7).item() == pytest.approx(score)


@pytest.mark.parametrize(
    ("true", "pred", "expected"),
    [
        ([0, 0, 0, 0], [3, 3, 3, 3], 1.0),  # one cluster on both sides
        ([0, 1, 2, 3], [5, 9, 7, 1], 1.0),  # every pixel its own, on both sides
        ([0, 1, 2, 3], [0, 0, 0, 0], 0.0),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),  # worse than chance
        ([7], [2], 1.0),
        ([], [], 1.0),
    ],
)
def test_ari_corner_cases(true, pred, expected):
    score = adjusted_rand_index(torch.tensor([true], dtype=torch.int64), torch.tensor([pred], dtype=torch.int64))
    assert score.tolist() == [expected]


def test_ari_without_foreground_or_images():
    empty, other = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.randint(0, 3, (2, 4, 4))
    assert adjusted_rand_index(empty, other, foreground_only=True).tolist() == [1.0, 1.0]
    one = empty.clone()
    one[0, 0, 0] = 9  # a single foreground pixel
    assert adjusted_rand_index(one, other, foreground_only=True).tolist() == [1.0, 1.0]
    assert adjusted_rand_index(empty[:0], other[:0]).shape == (0,)


def test_ari_is_exact_on_large_images():
    """Products of pair counts pass 2^63 here; one wrong pixel of a million must still show."""
    true = torch.zeros(1, 1024, 1024, dtype=torch.int32)
    true[:, :512] = 1
    assert adjusted_rand_index(true, 1 - true).item() == 1.0
    pred = true.clone()
    pred[0, 0, 0] = 0
    n, half = 1024**2, 1024**2 // 2
    pairs = lambda k: k * (k - 1) // 2  # noqa: E731
    tp = pairs(half - 1) + pairs(half)
    fn, fp = 2 * pairs(half) - tp, pairs(half - 1) + pairs(half + 1) - tp
    tn = pairs(n) - tp - fn - fp
    expected = 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))  # whole numbers of any size
    score = adjusted_rand_index(true, pred).item()
    assert score < 1 and abs(score - expected) < 1e-15


def test_ari_of_every_dtype_and_layout():
    true = torch.tensor([[[0, 1], [1, 0]], [[0, 0], [0, 1]]])
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64):
        assert adjusted_rand_index(true.to(dtype), true.transpose(1, 2)).tolist() == [1.0, 1.0]


def test_ari_refuses_what_is_no_labeling():
    with pytest.raises(TypeError, match=r"pred_labels must hold integer labels, got torch\.float32"):
        adjusted_rand_index(torch.zeros(1, 4).long(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"true \[1, 4\], pred \[1, 5\]"):
        adjusted_rand_index(torch.zeros(1, 4).long(), torch.zeros(1, 5).long())


# --- segmentation by the slot map


def slot_map_of(labels: torch.Tensor, K: int) -> torch.Tensor:
    """[B, R, R] labels -> a soft slot map [B, R·R, K] whose argmax they are."""
    return 0.3 + 0.4 * torch.nn.functional.one_hot(labels.flatten(1), K).float()


TRUE = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [0, 2, 2, 0], [0, 2, 2, 0]]])
#        object 1: 4 pixels, slot 1 takes 3 of them and no other; object 2: 4 pixels, slot 2 takes all and 2 more
PRED = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 0], [2, 2, 2, 0], [2, 2, 2, 0]]])


def test_overlaps_by_hand():
    slot_map = slot_map_of(PRED, 4)
    expected = (3 / 4 + 4 / 6) / 2
    assert mean_best_overlap(slot_map, TRUE).item() == pytest.approx(expected)
    assert mean_iou(slot_map, TRUE).item() == pytest.approx(expected)
    with_background = (3 / 4 + 4 / 6 + 6 / 9) / 3
    assert mean_best_overlap(slot_map, TRUE, include_background=True).item() == pytest.approx(with_background)
    assert mean_iou(slot_map, TRUE, include_background=True).item() == pytest.approx(with_background)


def test_ari_of_a_slot_map():
    slot_map, keep = slot_map_of(PRED, 4), TRUE[0] > 0
    assert ari(slot_map, TRUE).item() == pytest.approx(adjusted_rand_score(TRUE.flatten(), PRED.flatten()))
    assert fg_ari(slot_map, TRUE).item() == pytest.approx(adjusted_rand_score(TRUE[0][keep], PRED[0][keep]))
    assert torch.equal(fg_ari(slot_map, TRUE), fg_ari(PRED, TRUE))  # labels serve as well


def test_one_slot_cannot_be_matched_twice():
    true = torch.tensor([[[1, 1], [2, 2]]])
    pred = torch.zeros_like(true)  # one slot over both objects, IoU 1/2 with each
    assert mean_best_overlap(pred, true).item() == pytest.approx(0.5)
    assert mean_iou(pred, true).item() == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_best_there_is(seed):
    g = torch.Generator().manual_seed(seed)
    true, pred = torch.randint(0, 4, (2, 1, 6, 6), generator=g)
    iou = torch.zeros(3, 4)
    for t, p in itertools.product(range(3), range(4)):
        a, b = true == t + 1, pred == p
        iou[t, p] = (a & b).sum() / (a | b).sum()
    best = max(sum(iou[t, p] for t, p in enumerate(slots)) for slots in itertools.permutations(range(4), 3)) / 3
    assert mean_iou(pred, true).item() == pytest.approx(best.item(), abs=1e-6)
    assert mean_best_overlap(pred, true).item() == pytest.approx(iou.amax(1).mean().item(), abs=1e-6)


def test_images_of_a_batch_do_not_mix():
    g = torch.Generator().manual_seed(0)
    true, pred = torch.randint(0, 5, (2, 4, 6, 6), generator=g) * 100
    true[3] = 0  # no objects
    for score in (ari, fg_ari, mean_best_overlap, mean_iou):
        together = score(pred, true)
        assert together.shape == (4,) and together.dtype == torch.float64
        torch.testing.assert_close(together, torch.cat([score(pred[i : i + 1], true[i : i + 1]) for i in range(4)]))
    assert mean_best_overlap(pred, true)[3] == mean_iou(pred, true)[3] == fg_ari(pred, true)[3] == 1


def test_coarse_slot_map_is_resized_to_the_masks():
    coarse = torch.tensor([[[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]])
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert fg_ari(slot_map_of(coarse, 3), fine, grid=(4, 4)).item() == 1.0
    for side in ((16,), (2, 8)):  # 16 pixels are 4 x 4, 2 x 8, 16 x 1: nothing is guessed
        with pytest.raises(ValueError, match=r"give grid=\(height, width\) of the slot map"):
            fg_ari(slot_map_of(coarse, 3), fine, grid=None if len(side) == 1 else (3, 8))


def test_pictures_that_are_not_square():
    """Height and width are the masks': 4 x 9 pixels, as many as 6 x 6, are not taken for a square."""
    true = torch.zeros(1, 4, 9).long()
    true[:, :2, :3], true[:, 2:, 5:] = 1, 2
    meter = SegmentationMeter()
    meter.update(slot_map_of(true, 3), true)
    assert set(meter.result().values()) == {1.0}
    wide = slot_map_of(torch.tensor([[[0, 1, 2]]]), 3)  # 1 x 3, onto 2 x 6
    assert fg_ari(wide, torch.tensor([[[0, 0, 1, 1, 2, 2]] * 2]), grid=(1, 3)).item() == 1.0


@pytest.mark.parametrize("score", [ari, fg_ari, mean_best_overlap, mean_iou])
def test_ignored_pixels_are_not_scored(score):
    """A border labelled 255, as Pascal VOC draws it, on which slots do as they like."""
    true = torch.zeros(2, 12, 12).long()
    true[:, 2:6, 2:6], true[:, 7:11, 7:11] = 1, 2
    pred, bordered = true.clone(), true.clone()
    bordered[:, 1:7, 1:7], bordered[:, 2:6, 2:6] = 255, 1
    pred[bordered == 255] = torch.randint(0, 3, (int((bordered == 255).sum()),), generator=torch.manual_seed(0))
    assert score(pred, bordered, ignore=255).tolist() == [1.0, 1.0]
    assert max(score(pred, bordered)) < 1
    # as if those pixels were not there
    kept = bordered[0] != 255
    wrong = torch.where(torch.rand(12, 12, generator=torch.manual_seed(1)) < 0.7, true[0], 0)
    line = score(wrong[kept][None, None], true[0][kept][None, None])
    assert score(wrong[None], bordered[:1], ignore=255).item() == pytest.approx(line.item())
    assert score(pred, torch.full_like(true, 255), ignore=255).tolist() == [1.0, 1.0]  # nothing to score


@pytest.mark.parametrize("score", [ari, fg_ari, mean_best_overlap, mean_iou])
def test_numpy_arrays_are_scored_as_tensors_are(score):
    slot_map, true = slot_map_of(PRED, 3), TRUE
    expected = score(slot_map, true)
    assert torch.equal(score(slot_map.numpy(), true.numpy()), expected)
    assert torch.equal(score(PRED.numpy().astype("uint16"), true.numpy().astype("uint32")), expected)
    for wrong in ("labels", [[object()]], {"mask": 1}):
        with pytest.raises(TypeError, match="must be a tensor or a NumPy array of numbers, got"):
            score(wrong, true)


def test_segmentation_refuses_other_shapes():
    masks = torch.zeros(2, 4, 4).long()
    others = torch.rand(2, 15, 3), torch.rand(2, 4, 4, 3), torch.zeros(2, 4, 5).long(), torch.rand(2, 16, 0)
    for slot_map in others:
        with pytest.raises(ValueError, match="must"):
            fg_ari(slot_map, masks)
    with pytest.raises(ValueError, match=r"masks must be \[2, R, R\], got \[1, 4, 4\]"):
        fg_ari(torch.rand(2, 16, 3), masks[:1])
    with pytest.raises(TypeError, match="masks must hold integer labels"):
        fg_ari(torch.rand(2, 16, 3), masks.float())


def test_segmentation_meter_is_the_mean_over_images():
    g = torch.Generator().manual_seed(0)
    true, pred = torch.randint(0, 4, (2, 5, 6, 6), generator=g)
    meter = SegmentationMeter()
    meter.update(slot_map_of(pred[:2], 4), true[:2])
    meter.update(slot_map_of(pred[2:], 4), true[2:])
    expected = {"ari": ari, "fg_ari": fg_ari, "mbo": mean_best_overlap, "miou": mean_iou}
    assert meter.images == 5
    assert meter.result() == {k: pytest.approx(f(pred, true).mean().item()) for k, f in expected.items()}
    with pytest.raises(ValueError, match="no images"):
        SegmentationMeter().result()


# --- J-ARI and JIS


def jacobian_of(*pixels) -> torch.Tensor:
    """One image of 2x2 pixels, each given as its K slots' Jacobians -> [1, K, 2, 2]."""
    return torch.tensor(pixels, dtype=torch.float32).T.reshape(1, -1, 2, 2)


MASK = torch.tensor([[[1, 1], [2, 0]]])
JACOBIAN = jacobian_of([6, 2, 2], [5, 0, 0], [1, 2, 1], [0, 0, 9])  # shares of the largest: .6, 1, .5; background


def test_scores_by_hand():
    assert jacobian_ari(JACOBIAN, MASK) == 1.0
    rescaled = [(m - 1 / 3) / (2 / 3) for m in (0.6, 1.0, 0.5)]
    assert jacobian_interaction_score(JACOBIAN, MASK) == pytest.approx(sum(rescaled) / 3)
    assert isinstance(jacobian_ari(JACOBIAN, MASK), float)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_jis_ends_of_the_scale(scale):
    uniform = torch.full((2, 4, 3, 3), scale)
    one_hot = scale * torch.nn.functional.one_hot(torch.randint(0, 4, (2, 3, 3)), 4).permute(0, 3, 1, 2).float()
    masks = torch.ones(2, 3, 3).long()
    assert jacobian_interaction_score(uniform, masks) == pytest.approx(0, abs=1e-12)
    assert jacobian_interaction_score(one_hot, masks) == 1.0


def test_pixels_without_a_jacobian_are_left_out():
    dead = jacobian_of([6, 2, 2], [0, 0, 0], [1, 2, 1], [0, 0, 9])
    expected = ((0.6 - 1 / 3) + (0.5 - 1 / 3)) / (2 / 3) / 2
    assert jacobian_interaction_score(dead, MASK) == pytest.approx(expected)
    assert jacobian_interaction_score(0 * dead, MASK) == 0.0
    assert jacobian_interaction_score(dead, 0 * MASK) == 0.0
    assert jacobian_ari(dead, 0 * MASK) == 1.0


def test_a_single_slot():
    assert jacobian_interaction_score(torch.rand(1, 1, 2, 2), MASK) == 1.0
    assert jacobian_ari(torch.rand(1, 1, 2, 2), MASK) == 0.0


def test_jari_is_a_mean_over_images_and_jis_over_pixels():
    other = torch.tensor([[[1, 0], [0, 0]]])
    both, masks = torch.cat([JACOBIAN, JACOBIAN]), torch.cat([MASK, other])
    shares = [0.6, 1.0, 0.5, 0.6]
    assert jacobian_interaction_score(both, masks) == pytest.approx((sum(shares) / 4 - 1 / 3) / (2 / 3))
    swapped = jacobian_of([6, 2, 2], [0, 5, 0], [2, 1, 1], [0, 0, 9])
    expected = (1 + adjusted_rand_score([1, 1, 2], [0, 1, 0])) / 2
    assert jacobian_ari(torch.cat([JACOBIAN, swapped]), torch.cat([MASK, MASK])) == pytest.approx(expected)


def test_meter_pools_whatever_the_batches_and_paper_mode_does_not():
    g = torch.Generator().manual_seed(0)
    jacobian, masks = torch.rand(7, 3, 6, 6, generator=g) ** 4, torch.randint(0, 4, (7, 6, 6), generator=g)
    masks[0], masks[6] = 1, 0  # images weigh differently; the last one has no foreground
    batches = [slice(0, 1), slice(1, 6), slice(6, 7), slice(7, 7)]
    pooled, paper = JacobianMeter(), JacobianMeter("paper")
    for batch in batches:
        pooled.update(jacobian[batch], masks[batch])
        paper.update(jacobian[batch], masks[batch])
    result = pooled.result()
    assert result.j_ari == pytest.approx(jacobian_ari(jacobian, masks))
    assert result.jis == pytest.approx(jacobian_interaction_score(jacobian, masks))
    assert (result.images, result.pixels) == (7, int((masks > 0).sum()))
    jari = [jacobian_ari(jacobian[b], masks[b]) for b in batches[:3]]
    jis = [jacobian_interaction_score(jacobian[b], masks[b]) for b in batches[:2]]
    assert paper.result().j_ari == pytest.approx(sum(jari) / 3) != pytest.approx(result.j_ari)
    assert paper.result().jis == pytest.approx(sum(jis) / 2) != pytest.approx(result.jis)


def test_feature_maps_are_normalised_and_then_resized():
    coarse = jacobian_of([1, 3], [1000, 0], [1, 3], [1, 3])
    masks = torch.ones(1, 4, 4).long()
    share = coarse / coarse.sum(1, keepdim=True)
    fine = torch.nn.functional.interpolate(share, size=(4, 4), mode="bilinear", align_corners=False)
    expected = ((fine.amax(1) - 0.5) / 0.5).mean().item()
    assert jacobian_interaction_score(coarse, masks) == pytest.approx(expected)
    masks[0] = fine[0].argmax(0) + 1
    assert 1 < len(masks.unique()) and jacobian_ari(coarse, masks) == 1.0


def test_scores_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="finite"):
        jacobian_ari(JACOBIAN.masked_fill(JACOBIAN == 9, torch.nan), MASK)
    with pytest.raises(ValueError, match="not negative"):
        jacobian_interaction_score(-JACOBIAN, MASK)
    with pytest.raises(ValueError, match=r"jacobian must be float \[B, K, R, R\]"):
        jacobian_ari(JACOBIAN[0], MASK)
    with pytest.raises(ValueError, match=r"masks must be \[1, R, R\]"):
        jacobian_ari(JACOBIAN, torch.cat([MASK, MASK]))
    with pytest.raises(ValueError, match="no images"):
        jacobian_ari(JACOBIAN[:0], MASK[:0])
    with pytest.raises(ValueError, match="'pooled' or 'paper'"):
        JacobianMeter("median")


def test_masks_come_as_data_sets_give_them():
    """NumPy's, with an axis of one channel, and one image's pixels in a row as scikit-learn takes them."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (2, 6, 6), generator=generator)
    jacobian = torch.rand(2, 4, 6, 6, generator=generator)
    expected = jacobian_ari(jacobian, masks), jacobian_interaction_score(jacobian, masks)
    for same in (masks.numpy(), masks.to(torch.uint8)[..., None], masks[:, None].numpy()):
        assert (jacobian_ari(jacobian, same), jacobian_interaction_score(jacobian, same)) == expected
        torch.testing.assert_close(ari(jacobian.flatten(2).mT, same), ari(jacobian.flatten(2).mT, masks))
    true, pred = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(adjusted_rand_index(true, pred), torch.tensor([-0.5], dtype=torch.float64))
    assert adjusted_rand_index(true.numpy(), true.numpy()).tolist() == [1.0]
