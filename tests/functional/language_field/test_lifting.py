import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.language_field import lifting
from lightning_modules.functional.language_field.lifting import (
    MaskWeights,
    join_views,
    lift_features,
    mask_weights_of_view,
    product_chunks,
    select_gaussians,
    weight_per_gaussian,
)
from lightning_modules.functional.splatting.rasterization import BlendingWeights


def random_blending(seed: int, num_pixels: int = 40, num_gaussians: int = 9) -> BlendingWeights:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (num_pixels,), generator=generator)
    total = int(counts.sum())
    ids = torch.cat([torch.randperm(num_gaussians, generator=generator)[: int(count)] for count in counts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    weights = torch.rand(total, generator=generator) + 0.01
    return BlendingWeights(torch.arange(num_pixels), offsets, ids.int(), weights, num_gaussians)


def random_masks(seed: int, num_pixels: int = 40, num_masks: int = 4) -> torch.Tensor:
    return torch.randint(-1, num_masks, (num_pixels,), generator=torch.Generator().manual_seed(seed)).int()


def dense(mask_weights: MaskWeights) -> torch.Tensor:
    matrix = torch.zeros(mask_weights.num_gaussians, mask_weights.num_masks, dtype=torch.float64)
    for gaussian, mask, weight in zip(*mask_weights[:3], strict=True):
        matrix[gaussian, mask] += weight.double()
    return matrix


def literal_mask_weights(blending: BlendingWeights, mask_ids: torch.Tensor, num_masks: int) -> torch.Tensor:
    matrix = torch.zeros(blending.num_gaussians, num_masks, dtype=torch.float64)
    for pixel, mask in enumerate(mask_ids.tolist()):
        for entry in range(int(blending.offsets[pixel]), int(blending.offsets[pixel + 1])):
            if mask >= 0:
                matrix[blending.gaussian_ids[entry], mask] += blending.weights[entry].double()
    return matrix


@pytest.mark.parametrize("seed", range(3))
def test_mask_weights_equal_a_loop_over_pixels_and_contributors(seed):
    blending, mask_ids = random_blending(seed), random_masks(seed)
    weights = mask_weights_of_view(blending, mask_ids, 4)
    torch.testing.assert_close(dense(weights), literal_mask_weights(blending, mask_ids, 4), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_sort_of_other_devices_gives_the_same_sums_to_the_bit(seed):
    blending, mask_ids = random_blending(seed), random_masks(seed)
    weights = mask_weights_of_view(blending, mask_ids, 4)
    for ours, sorted_ in zip(weights, lifting._sums_by_sorting(blending, mask_ids, 4), strict=False):
        assert torch.equal(ours, sorted_.to(ours.dtype))


def test_entries_are_sorted_by_gaussian_and_mask_and_occur_once():
    weights = mask_weights_of_view(random_blending(4), random_masks(4), 4)
    keys = weights.gaussian_ids.long() * 4 + weights.mask_ids
    assert (keys.diff() > 0).all()
    assert (weights.gaussian_ids.dtype, weights.mask_ids.dtype) == (torch.int32, torch.int32)


def test_a_partition_into_masks_keeps_the_whole_blending_weight():
    blending = random_blending(5)
    mask_ids = random_masks(5).clamp(min=0)
    totals = torch.zeros(9).index_add_(0, blending.gaussian_ids.long(), blending.weights)
    torch.testing.assert_close(weight_per_gaussian(mask_weights_of_view(blending, mask_ids, 4)), totals)


def test_minimum_leaves_out_exactly_the_small_sums():
    blending, mask_ids = random_blending(6), random_masks(6)
    everything = dense(mask_weights_of_view(blending, mask_ids, 4))
    kept = dense(mask_weights_of_view(blending, mask_ids, 4, minimum=0.8))
    torch.testing.assert_close(kept, torch.where(everything > 0.8, everything, 0))
    assert 0 < (kept > 0).sum() < (everything > 0).sum()


def test_no_mask_and_no_gaussian_give_an_empty_matrix():
    unlabelled = mask_weights_of_view(random_blending(0), torch.full((40,), -1, dtype=torch.int32), 0)
    assert unlabelled.weights.shape == (0,)
    assert torch.equal(weight_per_gaussian(unlabelled), torch.zeros(9))
    nothing = BlendingWeights(
        torch.arange(2), torch.zeros(3, dtype=torch.int64), torch.zeros(0).int(), torch.zeros(0), 0
    )
    assert mask_weights_of_view(nothing, torch.tensor([0, 1]), 2).weights.shape == (0,)


@pytest.mark.parametrize(("mask_ids", "message"), [([0, 4] * 20, "between 0 and 3"), ([-2, 0] * 20, "-2 to 0")])
def test_mask_ids_outside_of_the_table_are_refused(mask_ids, message):
    with pytest.raises(ValueError, match=message):
        mask_weights_of_view(random_blending(0), torch.tensor(mask_ids), 4)


def test_mask_ids_of_other_pixels_are_refused():
    with pytest.raises(ValueError, match="3 pixels but the blending weights have 40"):
        mask_weights_of_view(random_blending(0), torch.zeros(3, dtype=torch.int32), 4)


def test_joined_views_are_the_matrices_side_by_side():
    parts = [mask_weights_of_view(random_blending(seed), random_masks(seed), 4) for seed in range(3)]
    joined = join_views(parts)
    assert torch.equal(dense(joined), torch.cat([dense(part) for part in parts], dim=1))
    keys = joined.gaussian_ids.long() * joined.num_masks + joined.mask_ids
    assert (keys.diff() > 0).all()


def test_joining_does_not_depend_on_how_the_views_were_grouped():
    parts = [mask_weights_of_view(random_blending(seed), random_masks(seed), 4) for seed in range(4)]
    nested = join_views([join_views(parts[:1]), join_views(parts[1:])])
    for left, right in zip(join_views(parts), nested, strict=True):
        assert torch.equal(torch.as_tensor(left), torch.as_tensor(right))


def test_views_of_two_scenes_are_refused():
    parts = [mask_weights_of_view(random_blending(0, num_gaussians=n), random_masks(0), 4) for n in (5, 6)]
    with pytest.raises(ValueError, match=r"\[5, 6\] Gaussians"):
        join_views(parts)
    with pytest.raises(ValueError, match="0 views"):
        join_views([])


def test_unselected_gaussians_have_empty_rows():
    weights = mask_weights_of_view(random_blending(7), random_masks(7), 4)
    keep = torch.arange(9) % 2 == 0
    assert torch.equal(dense(select_gaussians(weights, keep)), dense(weights) * keep[:, None])


@pytest.mark.parametrize("chunk_elements", [1 << 24, 7])
def test_product_equals_the_dense_product_in_chunks_of_any_size(monkeypatch, chunk_elements):
    monkeypatch.setattr(lifting, "_CHUNK_ELEMENTS", chunk_elements)
    weights = mask_weights_of_view(random_blending(8), random_masks(8), 4)
    values = torch.randn(4, 3, dtype=torch.float64)
    product = torch.cat([rows for _, rows in product_chunks(weights, values)])
    torch.testing.assert_close(product, dense(weights) @ values)


def test_product_with_another_tables_values_is_refused():
    weights = mask_weights_of_view(random_blending(8), random_masks(8), 4)
    with pytest.raises(ValueError, match="4 masks but 5 rows"):
        next(product_chunks(weights, torch.zeros(5, 3)))


def test_lifted_features_are_the_directions_of_the_weighted_means():
    weights = mask_weights_of_view(random_blending(9), random_masks(9), 4)
    features = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=-1)
    sums = dense(weights) @ features
    expected = sums / sums.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(lift_features(weights, features), expected)


def test_a_gaussian_that_paints_no_mask_gets_a_zero_feature():
    weights = MaskWeights(torch.tensor([1]).int(), torch.tensor([0]).int(), torch.ones(1), 3, 2)
    lifted = lift_features(weights, torch.eye(2))
    assert torch.equal(lifted, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_lifted_features_are_unit_and_free_of_the_scale_of_the_weights(seed, scale):
    weights = mask_weights_of_view(random_blending(seed), random_masks(seed), 4)
    features = torch.nn.functional.normalize(
        torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1, dim=-1
    )
    lifted = lift_features(weights, features)
    norms = lifted.norm(dim=-1)
    torch.testing.assert_close(norms, (weight_per_gaussian(weights) > 0).double())
    scaled = lift_features(weights._replace(weights=weights.weights.double() * scale), features)
    torch.testing.assert_close(scaled, lifted, rtol=1e-6, atol=1e-6)


def test_lifting_commutes_with_renumbering_gaussians_and_masks():
    blending, mask_ids = random_blending(10), random_masks(10)
    features = torch.randn(4, 5, dtype=torch.float64)
    gaussian_order, mask_order = torch.randperm(9), torch.randperm(4)  # old number -> new number
    renumbered = blending._replace(gaussian_ids=gaussian_order[blending.gaussian_ids.long()].int())
    new_masks = torch.where(mask_ids >= 0, mask_order[mask_ids.clamp(min=0).long()], -1)
    new_features = torch.empty_like(features).index_copy_(0, mask_order, features)
    lifted = lift_features(mask_weights_of_view(blending, mask_ids, 4), features)
    again = lift_features(mask_weights_of_view(renumbered, new_masks, 4), new_features)
    torch.testing.assert_close(again[gaussian_order], lifted, rtol=1e-6, atol=1e-6)
