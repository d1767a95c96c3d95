import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.language_field import mask_denoising
from lightning_modules.functional.language_field.lifting import MaskWeights
from lightning_modules.functional.language_field.mask_denoising import (
    DenoisingSettings,
    denoise_mask_features,
    mask_coverage,
)


def sparse(matrix: torch.Tensor) -> MaskWeights:
    gaussian_ids, mask_ids = matrix.nonzero().int().unbind(1)
    return MaskWeights(gaussian_ids, mask_ids, matrix[matrix != 0], *matrix.shape)


def random_world(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[30, 12] weights of 4 views with 3 masks each, features and the view of each mask."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(30, 12, generator=generator, dtype=dtype)
    matrix = matrix * (torch.rand(30, 12, generator=generator) < 0.5)
    features = F.normalize(torch.randn(12, 8, generator=generator, dtype=dtype), dim=-1)
    return matrix, features, torch.arange(4).repeat_interleave(3)


def literal_denoising(
    matrix: torch.Tensor, features: torch.Tensor, views: torch.Tensor, config: DenoisingSettings
) -> torch.Tensor:
    num_gaussians, num_masks = matrix.shape
    visible, claims = {}, [set() for _ in range(num_masks)]
    for n in range(num_gaussians):
        for m in range(num_masks):
            view_weight = sum(float(matrix[n, other]) for other in range(num_masks) if views[other] == views[m])
            if view_weight > config.min_view_weight:
                visible.setdefault(int(views[m]), set()).add(n)
                if matrix[n, m] > 0.5 * view_weight:
                    claims[m].add(n)
    denoised = features.clone()
    for m in range(num_masks):
        if not claims[m]:
            continue
        votes = []
        for other in range(num_masks):
            intersection = len(claims[m] & claims[other])
            seen = len(claims[m] & visible.get(int(views[other]), set()))
            seen_back = len(claims[other] & visible.get(int(views[m]), set()))
            iou = intersection / max(seen + seen_back - intersection, 1)
            votes.append(iou**2 * min(intersection / config.full_overlap, 1))
        mean = sum(vote * feature for vote, feature in zip(votes, features, strict=True))
        mean = mean / mean.norm()
        for _ in range(config.num_iterations):
            scaled = [
                vote * torch.exp((mean @ feature - 1) / config.temperature)
                for vote, feature in zip(votes, features, strict=True)
            ]
            mean = sum(vote * feature for vote, feature in zip(scaled, features, strict=True))
            mean = mean / mean.norm()
        denoised[m] = mean
    return denoised


@pytest.mark.parametrize("block_elements", [1 << 24, 30])
@pytest.mark.parametrize("seed", range(3))
def test_consensus_equals_sets_of_gaussians_and_loops(monkeypatch, seed, block_elements):
    monkeypatch.setattr(mask_denoising, "_BLOCK_ELEMENTS", block_elements)
    matrix, features, views = random_world(seed)
    config = DenoisingSettings(min_view_weight=0.4, full_overlap=5.0, temperature=0.3)
    denoised = denoise_mask_features(sparse(matrix), features, views, config)
    torch.testing.assert_close(denoised, literal_denoising(matrix, features, views, config))
    assert not torch.allclose(denoised, features)


def test_single_precision_stays_near_double():
    matrix, features, views = random_world(4)
    config = DenoisingSettings(full_overlap=5.0)
    single = denoise_mask_features(sparse(matrix.float()), features.float(), views, config)
    double = denoise_mask_features(sparse(matrix), features, views, config)
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_perfect_masks_keep_their_features(seed):
    generator = torch.Generator().manual_seed(seed)
    objects = torch.randint(0, 3, (40,), generator=generator)
    truth = F.normalize(torch.randn(3, 8, generator=generator, dtype=torch.float64), dim=-1)
    # In every view, mask o covers exactly the visible Gaussians of object o.
    one_hot = F.one_hot(objects, 3).double()
    matrix = torch.cat(
        [one_hot * (torch.rand(40, 1, generator=generator) < 0.7) * torch.rand(40, 1, generator=generator)] * 4, dim=1
    )
    features = truth.repeat(4, 1)
    denoised = denoise_mask_features(
        sparse(matrix), features, torch.arange(4).repeat_interleave(3), DenoisingSettings()
    )
    torch.testing.assert_close(denoised, features)


def test_one_wrong_mask_among_many_views_is_outvoted():
    truth, wrong = torch.eye(4, dtype=torch.float64)[:2]
    matrix = torch.ones(40, 6, dtype=torch.float64)
    features = torch.stack([truth] * 5 + [wrong])
    denoised = denoise_mask_features(sparse(matrix), features, torch.arange(6), DenoisingSettings())
    assert (denoised @ truth > 0.999).all()


def test_masks_that_share_no_gaussian_keep_their_features():
    _, features, views = random_world(5)
    apart = torch.zeros(12 * 3, 12, dtype=torch.float64)
    apart[torch.arange(36), torch.arange(12).repeat_interleave(3)] = 1.0
    torch.testing.assert_close(denoise_mask_features(sparse(apart), features, views, DenoisingSettings()), features)


def test_masks_of_other_levels_keep_their_features_to_the_bit():
    matrix, features, views = random_world(6)
    own = torch.arange(12) % 3 < 2
    denoised = denoise_mask_features(sparse(matrix * own), features, views, DenoisingSettings(full_overlap=3.0))
    assert torch.equal(denoised[~own], features[~own])
    assert not torch.equal(denoised[own], features[own])


def test_traces_below_the_visible_weight_have_no_vote():
    matrix, features, views = random_world(7)
    assert torch.equal(denoise_mask_features(sparse(matrix * 0.01), features, views, DenoisingSettings()), features)


def test_consensus_does_not_depend_on_the_numbering_of_gaussians_and_of_masks_in_a_view():
    matrix, features, views = random_world(8)
    config = DenoisingSettings(full_overlap=5.0)
    denoised = denoise_mask_features(sparse(matrix), features, views, config)
    masks = torch.cat([torch.randperm(3) + 3 * view for view in range(4)])
    again = denoise_mask_features(sparse(matrix[torch.randperm(30)][:, masks]), features[masks], views, config)
    torch.testing.assert_close(again, denoised[masks])


def test_coverage_counts_the_claimed_gaussians_each_view_sees():
    matrix = torch.tensor([[1.0, 0.2, 1.0], [0.1, 1.0, 0.0], [1.0, 0.0, 0.05]])
    coverage = mask_coverage(sparse(matrix), torch.tensor([0, 0, 1]), 0.15)
    assert torch.equal(coverage.claimed.to_dense(), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 0]]))
    assert torch.equal(coverage.seen, torch.tensor([[2.0, 1], [1, 0], [1, 1]]))


def test_no_masks_at_all_give_no_features():
    nothing = denoise_mask_features(
        sparse(torch.zeros(5, 0)), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), DenoisingSettings()
    )
    assert nothing.shape == (0, 3)


def test_masks_out_of_the_order_of_their_views_are_refused():
    with pytest.raises(ValueError, match="never decreases"):
        denoise_mask_features(sparse(torch.ones(2, 3)), torch.eye(3), torch.tensor([0, 1, 0]), DenoisingSettings())


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"full_overlap": 0.0}, {"num_iterations": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DenoisingSettings(**wrong)
