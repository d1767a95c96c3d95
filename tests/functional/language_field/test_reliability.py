import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.language_field import lifting
from lightning_modules.functional.language_field.lifting import MaskWeights
from lightning_modules.functional.language_field.reliability import (
    GateSettings,
    gate_gaussians,
    mask_consistency,
    neighbour_overlap,
    view_agreement,
)
from lightning_modules.functional.splatting.gaussians import GaussianScene


def sparse(matrix: torch.Tensor) -> MaskWeights:
    gaussian_ids, mask_ids = matrix.nonzero().int().unbind(1)
    return MaskWeights(gaussian_ids, mask_ids, matrix[matrix != 0], *matrix.shape)


def scene_of(means: torch.Tensor, scales: torch.Tensor, opacities: torch.Tensor) -> GaussianScene:
    """Discs a tenth as thick as wide."""
    log_scales = torch.stack([scales, scales, 0.1 * scales], dim=1).log()
    quaternions = torch.tensor([1.0, 0, 0, 0], dtype=means.dtype).expand(len(means), 4)
    return GaussianScene(means, log_scales, quaternions, opacities.logit(), torch.zeros(len(means), 1, 3))


def random_scene(seed: int, num_gaussians: int = 40) -> GaussianScene:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(num_gaussians, 5, generator=generator, dtype=torch.float64)
    return scene_of(draw[:, :3], 0.05 + 0.2 * draw[:, 3], 0.05 + 0.9 * draw[:, 4])


def literal_overlap(scene: GaussianScene, num_neighbours: int) -> torch.Tensor:
    means, sizes, opacities = scene.means.tolist(), scene.scales.amax(dim=1).tolist(), scene.opacities.tolist()
    overlap = []
    for n in range(len(means)):
        squared = sorted((math.dist(means[n], means[j]) ** 2, j) for j in range(len(means)) if j != n)
        terms = [
            opacities[j] * math.exp(-0.5 * distance / (sizes[n] ** 2 + sizes[j] ** 2))
            for distance, j in squared[:num_neighbours]
        ]
        overlap.append(sum(terms))
    return torch.tensor(overlap, dtype=torch.float64)


def surface_with_floaters(num_floaters: int) -> tuple[GaussianScene, list[MaskWeights], torch.Tensor]:
    """A flat 20 x 20 sheet of two objects seen by six views, and large floaters that paint either object at random."""
    grid = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij"), dim=-1).flatten(0, 1)
    sheet = F.pad(grid, (0, 1))
    floaters = torch.rand(num_floaters, 3) * 20 + torch.tensor([0.0, 0, 5])
    scales = torch.cat([torch.full((400,), 0.7), torch.full((num_floaters,), 0.2)])
    opacities = torch.cat([torch.full((400,), 0.8), torch.full((num_floaters,), 0.9)])
    scene = scene_of(torch.cat([sheet, floaters]), scales, opacities)
    left = (sheet[:, 0] < 10).float()
    paints_left = torch.cat([left.expand(6, 400), torch.randint(0, 2, (6, num_floaters))], dim=1)
    matrix = torch.stack([paints_left, 1 - paints_left], dim=-1).permute(1, 0, 2).flatten(1)
    matrix[400:] *= 10
    return scene, [sparse(matrix)], torch.eye(2).repeat(6, 1)


def dense(mask_weights: MaskWeights) -> torch.Tensor:
    matrix = torch.zeros(mask_weights.num_gaussians, mask_weights.num_masks, dtype=mask_weights.weights.dtype)
    return matrix.index_put_((mask_weights.gaussian_ids, mask_weights.mask_ids), mask_weights.weights)


@pytest.mark.parametrize("num_neighbours", [1, 16, 60])
def test_overlap_equals_a_loop_over_sorted_distances(num_neighbours):
    scene = random_scene(0)
    torch.testing.assert_close(neighbour_overlap(scene, num_neighbours), literal_overlap(scene, num_neighbours))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_overlap_is_the_same_in_other_units(seed, scale):
    scene = random_scene(seed)
    scaled = scene._replace(means=scene.means * scale + 7.0, log_scales=scene.log_scales + math.log(scale))
    torch.testing.assert_close(neighbour_overlap(scaled, 8), neighbour_overlap(scene, 8), rtol=1e-5, atol=1e-8)


def test_overlap_does_not_count_the_gaussian_itself_where_many_coincide():
    scene = scene_of(torch.zeros(30, 3), torch.ones(30), torch.full((30,), 0.5))
    torch.testing.assert_close(neighbour_overlap(scene, 16), torch.full((30,), 8.0))


@pytest.mark.parametrize("num_gaussians", [0, 1])
def test_overlap_without_neighbours_is_zero(num_gaussians):
    assert torch.equal(
        neighbour_overlap(random_scene(0, num_gaussians), 16), torch.zeros(num_gaussians, dtype=torch.float64)
    )


def test_agreement_is_the_length_of_the_mean_feature_averaged_over_the_levels_seen():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.rand(9, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    matrices[0][4] = 0.0  # seen in one level
    matrices[0][5] = matrices[1][5] = 0.0  # seen in none
    features = F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1)
    expected = torch.zeros(9, dtype=torch.float64)
    for n in range(9):
        lengths = [float((row @ features).norm() / row.sum()) for row in (m[n] for m in matrices) if row.sum() > 0]
        expected[n] = sum(lengths) / len(lengths) if lengths else 0.0
    torch.testing.assert_close(view_agreement([sparse(m) for m in matrices], features), expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_agreement_is_between_zero_and_one_and_one_for_one_feature(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(9, 6, generator=generator, dtype=torch.float64)
    features = F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1)
    agreement = view_agreement([sparse(matrix)], features)
    assert ((agreement >= 0) & (agreement <= 1 + 1e-9)).all()
    same = view_agreement([sparse(matrix)], features[:1].expand(6, 4).contiguous())
    torch.testing.assert_close(same, torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("chunk_elements", [1 << 24, 8])
def test_consistency_equals_a_loop_over_masks(monkeypatch, chunk_elements):
    monkeypatch.setattr(lifting, "_CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.rand(9, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    for own, matrix in enumerate(matrices):
        matrix[torch.rand(9, 6, generator=generator) < 0.4] = 0.0
        matrix[:, (1 - own) * 3 : (1 - own) * 3 + 3] = 0.0  # three masks of each level
    features = F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1)
    keep = torch.rand(9, generator=generator) < 0.7
    expected = []
    for choice in (torch.ones(9, dtype=torch.bool), keep):
        cosines = []
        for own, matrix in enumerate(matrices):
            for mask in range(3 * own, 3 * own + 3):
                painted = torch.zeros(4, dtype=torch.float64)
                for n in range(9):
                    mean = matrix[n] @ features
                    if choice[n] and mean.norm() > 0:
                        painted += matrix[n, mask] * mean / mean.norm()
                cosines.append(float(F.cosine_similarity(painted, features[mask], dim=0)))
        expected.append(sum(cosines) / 6)
    assert mask_consistency([sparse(matrix) for matrix in matrices], features, keep) == pytest.approx(tuple(expected))


def test_gate_drops_floaters_and_keeps_the_surface():
    scene, mask_weights, features = surface_with_floaters(30)
    reliability = gate_gaussians(scene, mask_weights, features, GateSettings())
    assert reliability.skipped is None
    assert reliability.keep[:400].all()
    assert not reliability.keep[400:].any()
    assert reliability.dropped_weight == pytest.approx(300 / 700)
    assert reliability.gated_consistency > reliability.consistency + 0.02


def test_each_test_of_the_gate_equals_its_definition():
    scene, (level,), features = surface_with_floaters(30)
    level = level._replace(weights=level.weights * (0.5 + torch.rand(len(level.weights))))
    noisy = F.normalize(features + 0.4 * torch.rand(12, 2), dim=-1)
    config = GateSettings(
        min_overlap=1.5,
        min_opacity=0.5,
        max_deviations=0.5,
        min_disagreement=0.0,
        min_relative_weight=0.9,
        min_consistency_gain=-1.0,
    )
    reliability = gate_gaussians(scene, [level], noisy, config)
    agreement, weights = reliability.agreement, dense(level).sum(dim=1)
    deviation = (agreement - agreement.median()).abs().median()
    fails = (
        (neighbour_overlap(scene, 16) <= 1.5)
        | (scene.opacities <= 0.5)
        | (agreement < agreement.median() - 0.5 * deviation)
    )
    dropped = fails & (weights > 0.9 * weights.median())
    assert torch.equal(reliability.keep, ~dropped)
    assert 0 < dropped[:400].sum() < fails[:400].sum()
    assert reliability.dropped_weight == pytest.approx(float(weights[dropped].sum() / weights.sum()))
    assert (reliability.consistency, reliability.gated_consistency) == mask_consistency([level], noisy, ~dropped)


def test_gate_skips_a_scene_whose_masks_gain_nothing_and_says_so():
    scene, mask_weights, features = surface_with_floaters(0)
    reliability = gate_gaussians(scene, mask_weights, features, GateSettings(min_overlap=9.0, min_relative_weight=0.5))
    assert reliability.keep.all()
    assert reliability.dropped_weight == 1.0
    assert "consistency from 1.0000 to 0.0000" in str(reliability.skipped)


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-2, 1e2), pixels=st.floats(1e-2, 1e2))
def test_gate_is_free_of_the_units_of_the_scene_and_of_the_resolution(scale, pixels):
    torch.manual_seed(0)
    scene, (level,), features = surface_with_floaters(30)
    scaled = scene._replace(means=scene.means * scale, log_scales=scene.log_scales + math.log(scale))
    finer = level._replace(weights=level.weights * pixels)
    expected = gate_gaussians(scene, [level], features, GateSettings()).keep
    assert torch.equal(gate_gaussians(scaled, [finer], features, GateSettings()).keep, expected)


def test_gate_commutes_with_renumbering_the_gaussians():
    scene, (level,), features = surface_with_floaters(30)
    order = torch.randperm(430)
    renumbered = GaussianScene(*(part[order] for part in scene))
    keep = gate_gaussians(scene, [level], features, GateSettings()).keep
    again = gate_gaussians(renumbered, [sparse(dense(level)[order])], features, GateSettings()).keep
    assert torch.equal(again, keep[order])


def test_gaussians_that_paint_no_mask_do_not_shift_the_medians():
    scene, (level,), features = surface_with_floaters(30)
    padding = [torch.cat([part, part[:300]]) for part in scene]
    matrix = torch.cat([dense(level), torch.zeros(300, 12)])
    reliability = gate_gaussians(GaussianScene(*padding), [sparse(matrix)], features, GateSettings())
    assert torch.equal(reliability.keep[:430], gate_gaussians(scene, [level], features, GateSettings()).keep)


def test_a_scene_without_masks_is_not_gated():
    scene, _, features = surface_with_floaters(0)
    reliability = gate_gaussians(scene, [sparse(torch.zeros(400, 12))], features, GateSettings())
    assert reliability.keep.all()
    assert reliability.skipped == "no Gaussian paints any mask"
