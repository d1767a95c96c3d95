"""Adaptive density control: schedules, who is cloned, split and removed, what becomes of the picture and of Adam."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.splatting.densification import (
    Densification,
    DensificationSettings,
    densify,
    inherited_moments,
    reset_opacities,
    screen_gradient_norms,
)
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization_reference import render
from tests.functional.random_scenes import facing_camera

EXTENT = 10.0  # percent_dense 0.01: standard deviations up to 0.1 are cloned, larger ones split
SETTINGS = DensificationSettings()


def scene_of(scales: list[float], opacities: list[float], means: list[list[float]] | None = None) -> GaussianScene:
    num = len(scales)
    generator = torch.Generator().manual_seed(num)
    return GaussianScene(
        means=torch.randn(num, 3, generator=generator) if means is None else torch.tensor(means),
        log_scales=torch.tensor(scales).log()[:, None].repeat(1, 3),
        quaternions=torch.randn(num, 4, generator=generator),
        opacity_logits=torch.tensor(opacities).logit(),
        spherical_harmonics=torch.randn(num, 1, 3, generator=generator),
    )


def after(scene: GaussianScene, change: Densification) -> GaussianScene:
    return GaussianScene(
        change.means,
        change.log_scales,
        scene.quaternions[change.parents],
        change.opacity_logits,
        scene.spherical_harmonics[change.parents],
    )


def test_gaussians_change_at_the_iterations_of_3dgs():
    changes = [iteration for iteration in range(20_000) if SETTINGS.densifies_at(iteration)]
    assert changes == list(range(600, 15_000, 100))
    assert [iteration for iteration in range(20_000) if SETTINGS.resets_opacity_at(iteration)] == [
        3000,
        6000,
        9000,
        12_000,
    ]
    on_white = [iteration for iteration in range(4000) if SETTINGS.resets_opacity_at(iteration, on_white=True)]
    assert on_white == [500, 3000]
    assert SETTINGS.gathers_at(1)
    assert SETTINGS.gathers_at(14_999)
    assert not SETTINGS.gathers_at(15_000)
    assert not DensificationSettings(reset_opacity_every=0).resets_opacity_at(3000, on_white=True)


def test_small_gaussians_are_cloned_and_large_ones_split_where_the_gradient_is_large():
    scene = scene_of([0.05, 0.05, 0.5, 0.5], [0.6] * 4)
    change = densify(scene, torch.tensor([1e-3, 1e-5, 1e-3, 1e-5]), EXTENT, SETTINGS, iteration=600)
    assert change.parents.tolist() == [0, 1, 3, 0, 2, 2]  # those that stay, clones, halves
    assert change.is_new.tolist() == [False, False, False, True, True, True]
    assert (change.num_cloned, change.num_split, change.num_pruned) == (1, 1, 0)
    torch.testing.assert_close(change.means[:4], scene.means[[0, 1, 3, 0]])
    torch.testing.assert_close(change.log_scales[4:].exp(), torch.full((2, 3), 0.5 / 1.6))
    torch.testing.assert_close(change.opacity_logits, scene.opacity_logits[change.parents])


def test_halves_lie_where_their_parent_was():
    num = 4000
    scene = scene_of([0.5] * num, [0.6] * num, means=[[1.0, 2.0, 3.0]] * num)
    scene = scene._replace(
        quaternions=torch.tensor([math.cos(0.4), 0.0, 0.0, math.sin(0.4)]).repeat(num, 1),
        log_scales=torch.tensor([0.5, 0.2, 0.1]).log().repeat(num, 1),
    )
    change = densify(scene, torch.ones(num), EXTENT, SETTINGS, iteration=600)
    offsets = (change.means - torch.tensor([1.0, 2.0, 3.0])).double()
    turned = np.array([[np.cos(0.8), -np.sin(0.8), 0], [np.sin(0.8), np.cos(0.8), 0], [0, 0, 1]])
    expected = turned @ np.diag([0.25, 0.04, 0.01]) @ turned.T
    np.testing.assert_allclose(offsets.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(offsets.numpy().T), expected, atol=0.015)


def test_halves_depend_on_step_and_seed_alone():
    scene = scene_of([0.5] * 5, [0.6] * 5)
    norms = torch.ones(5)
    torch.manual_seed(1)
    first = densify(scene, norms, EXTENT, SETTINGS, iteration=600, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.means, densify(scene, norms, EXTENT, SETTINGS, iteration=600, seed=3).means)
    assert not torch.equal(first.means, densify(scene, norms, EXTENT, SETTINGS, iteration=700, seed=3).means)
    assert not torch.equal(first.means, densify(scene, norms, EXTENT, SETTINGS, iteration=600, seed=4).means)


def test_faint_gaussians_go_and_huge_ones_after_the_first_reset():
    scene = scene_of([0.05, 0.05, 1.5], [0.6, 0.004, 0.6])
    norms = torch.zeros(3)
    assert densify(scene, norms, EXTENT, SETTINGS, iteration=3000).parents.tolist() == [0, 2]
    assert densify(scene, norms, EXTENT, SETTINGS, iteration=3100).parents.tolist() == [0]


def parents_and_scales_step_by_step(
    scene: GaussianScene, norms: torch.Tensor, iteration: int
) -> tuple[list[int], list[float]]:
    """What 3DGS does step by step: append clones, append halves, drop what was split, drop faint and huge ones."""
    size, opacity = scene.scales.amax(1).tolist(), scene.opacities.tolist()
    listed = [(parent, size[parent]) for parent in range(len(size))]
    gradients = norms.tolist()
    for parent in range(len(size)):
        if norms[parent] >= 2e-4 and size[parent] <= 0.01 * EXTENT:
            listed.append((parent, size[parent]))
            gradients.append(0.0)  # 3DGS pads with zeros: a clone is not split
    split = [gradients[row] >= 2e-4 and scale > 0.01 * EXTENT for row, (_, scale) in enumerate(listed)]
    chosen = [entry for entry, is_split in zip(listed, split, strict=True) if is_split]
    listed = [entry for entry, is_split in zip(listed, split, strict=True) if not is_split]
    listed += [(parent, scale / 1.6) for _ in range(2) for parent, scale in chosen]
    listed = [(parent, scale) for parent, scale in listed if opacity[parent] >= 0.005]
    if iteration > 3000:
        listed = [(parent, scale) for parent, scale in listed if scale <= 0.1 * EXTENT]
    return [parent for parent, _ in listed], [scale for _, scale in listed]


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 40), seed=st.integers(0, 2**31), iteration=st.sampled_from([600, 3000, 3100]))
def test_the_outcome_is_that_of_3dgs_step_by_step(num, seed, iteration):
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.uniform(np.log(0.01), np.log(3), num))
    scene = scene_of(scales.tolist(), rng.uniform(0.001, 0.02, num).tolist())
    norms = torch.from_numpy(rng.choice([0.0, 1e-4, 1e-3], num)).float()
    change = densify(scene, norms, EXTENT, SETTINGS, iteration=iteration)
    parents, expected = parents_and_scales_step_by_step(scene, norms, iteration)
    assert change.parents.tolist() == parents
    np.testing.assert_allclose(change.log_scales.exp().amax(1).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(change.opacity_logits, scene.opacity_logits[parents])


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 40), cap=st.integers(1, 80), seed=st.integers(0, 2**31), revise=st.booleans())
def test_counts_add_up_and_never_pass_the_cap(num, cap, seed, revise):
    rng = np.random.default_rng(seed)
    scene = scene_of(rng.uniform(0.01, 0.3, num).tolist(), rng.uniform(0.001, 0.99, num).tolist())
    norms = torch.from_numpy(rng.choice([0.0, 1e-4, 2e-4, 1e-3, 1e-2], num)).float()
    chosen = DensificationSettings(max_gaussians=cap, revise_clones=revise)
    change = densify(scene, norms, EXTENT, chosen, iteration=600)
    assert len(change.parents) == num + change.num_cloned + change.num_split - change.num_pruned
    assert len(change.parents) <= max(num, cap)
    grown = change.num_cloned + change.num_split
    assert grown == min(max(cap - num, 0), int((norms >= 2e-4).sum()))
    assert {len(part) for part in change[:5]} == {len(change.parents)}


def test_a_cap_serves_the_largest_gradients_first():
    scene = scene_of([0.05] * 4, [0.6] * 4)
    settings_ = DensificationSettings(max_gaussians=6)
    change = densify(scene, torch.tensor([3e-4, 5e-4, 4e-4, 1e-3]), EXTENT, settings_, iteration=600)
    assert sorted(change.parents[change.is_new].tolist()) == [1, 3]


@pytest.mark.parametrize("opacity", [0.1, 0.3, 0.8, 0.985])
def test_revised_clones_cover_together_what_the_one_did(opacity):
    camera = facing_camera()
    scene = scene_of([0.08], [opacity], means=[[0.0, 0.0, 2.0]])
    change = densify(scene, torch.ones(1), EXTENT, DensificationSettings(revise_clones=True), iteration=600)
    before, after_ = [render(x, camera, torch.arange(64 * 48))[2] for x in (scene, after(scene, change))]
    centre = 24 * 64 + 32
    assert after_[centre] == pytest.approx(float(before[centre]), rel=1e-3)
    plain = densify(scene, torch.ones(1), EXTENT, SETTINGS, iteration=600)
    unrevised = render(after(scene, plain), camera, torch.arange(64 * 48))[2]
    assert (after_ - before).abs().sum() < 0.8 * (unrevised - before).abs().sum()


def test_split_gaussians_cover_about_what_they_did():
    camera = facing_camera()
    num = 40
    rng = np.random.default_rng(0)
    means = np.stack([rng.uniform(-1, 1, num), rng.uniform(-0.8, 0.8, num), rng.uniform(2, 3, num)], 1)
    scene = scene_of([0.2] * num, [0.3] * num, means=means.tolist())
    change = densify(scene, torch.ones(num), EXTENT, SETTINGS, iteration=600)
    before, after_ = [render(x, camera, torch.arange(64 * 48))[2] for x in (scene, after(scene, change))]
    assert change.num_split == num
    assert after_.mean() == pytest.approx(float(before.mean()), rel=0.2)
    assert torch.corrcoef(torch.stack([before, after_]))[0, 1] > 0.8


def test_moments_follow_their_gaussians_and_begin_at_zero_for_new_ones():
    scene = scene_of([0.05, 0.5, 0.05], [0.6, 0.6, 0.001])
    change = densify(scene, torch.tensor([1e-3, 1e-3, 0.0]), EXTENT, SETTINGS, iteration=600)
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.arange(9.0).reshape(3, 3) + 1,
        "exp_avg_sq": torch.arange(3.0)[:, None, None] + 1,
    }
    moments = inherited_moments(state, change.parents, change.is_new)
    assert change.parents.tolist() == [0, 0, 1, 1]
    assert moments["step"] == 7
    assert moments["exp_avg"].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert moments["exp_avg_sq"].shape == (4, 1, 1)


def test_a_reset_lowers_opacities_and_raises_none():
    logits = reset_opacities(torch.tensor([0.9, 0.01, 0.001]).logit(), 0.01)
    torch.testing.assert_close(logits.sigmoid(), torch.tensor([0.01, 0.01, 0.001]))


def test_gradients_by_pixels_become_gradients_by_image_coordinates():
    norms = screen_gradient_norms(torch.tensor([[3e-3, 0.0], [0.0, 4e-3], [3e-3, 4e-3]]), 200, 100)
    torch.testing.assert_close(norms, torch.tensor([0.3, 0.2, (0.3**2 + 0.2**2) ** 0.5]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"reset_opacity_to": 0.001}, "reset_opacity_to is 0.001; allowed: above min_opacity"),
        ({"max_gaussians": -1}, "max_gaussians is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DensificationSettings(**wrong)
