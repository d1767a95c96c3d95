import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting import rasterization, rasterization_reference
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import (
    BlendingWeights,
    blending_weights,
    prepare_view,
    render,
    render_codes,
    splat_codes,
)
from tests.functional.random_scenes import (
    as_float64,
    facing_camera,
    isotropic_scene,
    random_camera,
    random_codes,
    random_scene,
)

SEEDS = range(8)


def dense(weights: BlendingWeights) -> Tensor:
    matrix = torch.zeros(weights.pixel_ids.numel(), weights.num_gaussians)
    rows = torch.repeat_interleave(weights.offsets.diff())
    return matrix.index_put_((rows, weights.gaussian_ids.long()), weights.weights, accumulate=True)


def reference(scene: GaussianScene, camera: Camera) -> tuple[rasterization_reference.DenseBlending, Tensor, Tensor]:
    """The twin in float64 over all pixels: its blending, weights per Gaussian, and the pixels that rounding decides."""
    scene, camera = as_float64(scene, camera)
    projected = rasterization_reference.project_gaussians(scene, camera)
    blending = rasterization_reference.blend(scene, projected, camera, torch.arange(camera.num_pixels))
    weights = blending.weights.new_zeros(camera.num_pixels, scene.num_gaussians)
    return blending, weights.index_copy(1, projected.gaussian_ids, blending.weights), blending.is_ambiguous


@pytest.mark.parametrize("seed", SEEDS)
def test_blending_weights_equal_the_twin(seed: int) -> None:
    camera = random_camera(seed)
    scene = random_scene(seed, camera)
    weights = blending_weights(prepare_view(scene, camera))
    _, expected, is_ambiguous = reference(scene, camera)
    assert is_ambiguous.float().mean() < 0.1
    assert (expected > 0).sum() > 3 * camera.num_pixels  # pixels blend several Gaussians, or nothing is tested
    torch.testing.assert_close(dense(weights)[~is_ambiguous], expected.float()[~is_ambiguous], atol=2e-5, rtol=1e-4)
    assert torch.equal((dense(weights) > 0)[~is_ambiguous], (expected > 0)[~is_ambiguous])


@pytest.mark.parametrize(("seed", "num_bases"), [(0, 1), (1, 4), (2, 9), (3, 16)])
def test_colour_depth_and_alpha_equal_the_twin(seed: int, num_bases: int) -> None:
    camera = random_camera(seed)
    scene = random_scene(seed, camera, num_bases=num_bases)
    background = torch.tensor([0.2, 0.9, 0.4])
    rendered = render(scene, prepare_view(scene, camera), background=background)
    expected = rasterization_reference.render(
        *as_float64(scene, camera), torch.arange(camera.num_pixels), background.double()
    )
    is_clear = ~reference(scene, camera)[2]
    for actual, wanted in zip(rendered, expected, strict=True):
        torch.testing.assert_close(actual[is_clear], wanted.float()[is_clear], atol=1e-4, rtol=1e-4)


def test_weights_and_the_transmittance_left_sum_to_one() -> None:
    camera = random_camera(3)
    scene = random_scene(3, camera)
    blending, _, is_ambiguous = reference(scene, camera)
    alphas = blending_weights(prepare_view(scene, camera)).alphas
    total = alphas + blending.transmittances.float()
    torch.testing.assert_close(total[~is_ambiguous], torch.ones_like(total)[~is_ambiguous], atol=2e-5, rtol=0)


def test_weights_lie_front_to_back() -> None:
    camera = random_camera(4)
    scene = random_scene(4, camera)
    weights = blending_weights(prepare_view(scene, camera))
    depth = (scene.means @ camera.camera_from_world[:3, :3].T + camera.camera_from_world[:3, 3])[:, 2]
    rows = torch.repeat_interleave(weights.offsets.diff())
    steps = depth[weights.gaussian_ids.long()].diff()
    assert (steps[rows.diff() == 0] >= 0).all()


class TestClosedForms:
    def test_one_gaussian_falls_off_as_a_normal_density_with_the_low_pass_added(self) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.3], [0.7])
        image = render(scene, prepare_view(scene, camera)).alpha.unflatten(0, (48, 64))
        variance = (50 * 0.3 / 4) ** 2 + 0.3
        for dx, dy in [(0, 0), (3, 0), (-2, 5), (0, -7)]:
            expected = 0.7 * math.exp(-(dx * dx + dy * dy) / (2 * variance))
            assert image[24 + dy, 32 + dx] == pytest.approx(expected, rel=1e-5)

    def test_alpha_below_one_in_255_is_nothing(self) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.24], [0.1])
        row = render(scene, prepare_view(scene, camera)).alpha.unflatten(0, (48, 64))[24]
        variance = 9.3
        expected = [0.1 * math.exp(-((x - 32) ** 2) / (2 * variance)) for x in range(64)]
        assert ((row > 0) == torch.tensor([alpha >= 1 / 255 for alpha in expected])).all()
        assert 0 < (row > 0).sum() < 32

    def test_the_gaussian_behind_is_dimmed_by_the_one_in_front(self) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, 5.0], [0.0, 0.0, 3.0]], [0.3, 0.2], [0.8, 0.6])
        centre = torch.tensor([24 * 64 + 32])
        weights = blending_weights(prepare_view(scene, camera), centre)
        assert weights.gaussian_ids.tolist() == [1, 0]
        assert weights.weights.tolist() == pytest.approx([0.6, 0.8 * 0.4], rel=1e-5)
        rendered = render(scene, prepare_view(scene, camera), centre)
        assert rendered.depth.item() == pytest.approx((0.6 * 3 + 0.32 * 5) / 0.92, rel=1e-5)

    def test_alpha_is_at_most_99_hundredths(self) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.3], [0.999])
        assert render(scene, prepare_view(scene, camera)).alpha.max() == pytest.approx(0.99)

    def test_a_gaussian_that_would_leave_less_than_a_ten_thousandth_is_not_added(self) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, z] for z in (2.0, 3.0, 4.0, 5.0)], [0.3] * 4, [0.95, 0.95, 0.95, 0.6])
        weights = blending_weights(prepare_view(scene, camera), torch.tensor([24 * 64 + 32]))
        assert weights.gaussian_ids.tolist() == [0, 1, 2]  # the fourth would leave 0.05^3 x 0.4 = 5e-5
        assert weights.alphas.item() == pytest.approx(1 - 0.05**3, rel=1e-5)

    def test_background_shows_through_colour_but_not_through_codes(self) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.3], [0.7])
        view = prepare_view(scene, camera)
        rgb = render(scene, view, background=torch.ones(3)).rgb
        colour = 0.5 + 0.28209479
        assert rgb[24 * 64 + 32].tolist() == pytest.approx([0.7 * colour + 0.3] * 3, rel=1e-5)
        assert rgb[0].tolist() == [1, 1, 1]
        codes = random_codes(0, 1)._replace(values=torch.ones(1, 5))
        weight_map, alpha = render_codes(view, codes)
        torch.testing.assert_close(weight_map.sum(1), 5 * alpha)

    @pytest.mark.parametrize(("z", "is_visible"), [(-4.0, False), (0.0, False), (0.19, False), (0.21, True)])
    def test_depth_of_a_fifth_of_a_metre_and_nearer_is_culled(self, z: float, is_visible: bool) -> None:
        camera = facing_camera()
        scene = isotropic_scene([[0.0, 0.0, z]], [0.01], [0.9])
        assert (blending_weights(prepare_view(scene, camera)).weights.numel() > 0) == is_visible

    def test_the_square_of_three_sigma_decides_by_whole_tiles(self) -> None:
        # sigma is 8 px: the square ends 25 px from the centre at x = 7, so tile 2 (from x = 32) is not touched although
        # alpha is 0.008 there; inside the touched tile 1, alpha counts out to its border.
        camera = facing_camera()._replace(intrinsics=torch.tensor([[50.0, 0, 7.5], [0, 50.0, 24.5], [0, 0, 1]]))
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.64], [0.99])
        row = render(scene, prepare_view(scene, camera)).alpha.unflatten(0, (48, 64))[24]
        assert row[31] == pytest.approx(0.99 * math.exp(-(24**2) / (2 * 64.3)), rel=1e-4)
        assert row[32] == 0


class TestProperties:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 10**6))
    def test_the_order_of_the_gaussians_does_not_matter(self, seed: int) -> None:
        camera = random_camera(seed)
        scene = random_scene(seed, camera)
        order = torch.randperm(scene.num_gaussians, generator=torch.Generator().manual_seed(seed))
        shuffled = GaussianScene(*(parameter[order] for parameter in scene))
        weights, of_shuffled = (blending_weights(prepare_view(s, camera)) for s in (scene, shuffled))
        assert torch.equal(weights.gaussian_ids, order[of_shuffled.gaussian_ids.long()].int())
        assert torch.equal(weights.weights, of_shuffled.weights)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 10**6), count=st.integers(1, 400))
    def test_chosen_pixels_equal_the_rows_of_the_image(self, seed: int, count: int) -> None:
        camera = random_camera(seed)
        scene = random_scene(seed, camera)
        pixels = torch.randint(0, camera.num_pixels, (count,), generator=torch.Generator().manual_seed(seed))
        pixels = torch.cat([pixels, pixels[:3]])  # repeated pixels are rows of their own
        view, codes = prepare_view(scene, camera), random_codes(seed, scene.num_gaussians)
        chosen = blending_weights(view, pixels)
        assert torch.equal(chosen.pixel_ids, pixels)
        assert torch.equal(dense(chosen), dense(blending_weights(view))[pixels])
        for actual, whole in zip(render(scene, view, pixels), render(scene, view), strict=True):
            assert torch.equal(actual, whole[pixels])
        for actual, whole in zip(render_codes(view, codes, pixels), render_codes(view, codes), strict=True):
            assert torch.equal(actual, whole[pixels])

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("active", "num_channels"), [(1, 1), (4, 16), (12, 192), (7, 45)])
    def test_fused_codes_equal_stored_weights_times_codes(self, seed: int, active: int, num_channels: int) -> None:
        camera = random_camera(seed)
        scene = random_scene(seed, camera)
        view, codes = prepare_view(scene, camera), random_codes(seed, scene.num_gaussians, active, num_channels)
        weights = blending_weights(view)
        weight_map, alpha = render_codes(view, codes)
        torch.testing.assert_close(weight_map, splat_codes(weights, codes), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(alpha, weights.alphas, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(alpha, render(scene, view).alpha)

    def test_results_are_the_same_bits_on_any_number_of_threads(self, restored_threads: None) -> None:
        camera = random_camera(0, width=149, height=97)
        scene = random_scene(0, camera, num_gaussians=400)
        codes = random_codes(0, scene.num_gaussians)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            view = prepare_view(scene, camera)
            weights = blending_weights(view)
            values = codes.values.clone().requires_grad_()
            weight_map = splat_codes(weights, codes._replace(values=values))
            (gradient,) = torch.autograd.grad(weight_map.square().sum(), values)
            results.append((*weights[:4], weight_map, gradient, *render(scene, view), *render_codes(view, codes)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_strips_of_one_pixel_as_on_cuda_equal_strips_of_sixteen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        camera = random_camera(5)
        scene = random_scene(5, camera)
        view, codes = prepare_view(scene, camera), random_codes(5, scene.num_gaussians)
        pixels = torch.arange(camera.num_pixels)
        wide = (*blending_weights(view, pixels)[:4], *render(scene, view, pixels), *render_codes(view, codes, pixels))
        monkeypatch.setattr(rasterization, "_lanes", lambda device: 1)
        narrow = (*blending_weights(view, pixels)[:4], *render(scene, view, pixels), *render_codes(view, codes, pixels))
        for a, b in zip(wide, narrow, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestEmptyInput:
    @pytest.mark.parametrize("num_gaussians", [0, 30])
    def test_a_view_of_nothing_is_background(self, num_gaussians: int) -> None:
        camera = facing_camera()
        scene = random_scene(0, camera, num_gaussians)
        scene = scene._replace(means=scene.means - torch.tensor([0.0, 0.0, 100.0]))
        view = prepare_view(scene, camera)
        rgb, depth, alpha = render(scene, view, background=torch.tensor([0.1, 0.2, 0.3]))
        assert torch.equal(rgb, torch.tensor([0.1, 0.2, 0.3]).expand(camera.num_pixels, 3))
        assert not depth.any()
        assert not alpha.any()
        weights = blending_weights(view)
        assert weights.offsets.shape == (camera.num_pixels + 1,)
        assert weights.weights.numel() == 0
        weight_map, _ = render_codes(view, random_codes(0, num_gaussians))
        assert weight_map.shape == (camera.num_pixels, 19)
        assert not weight_map.any()

    def test_no_pixels_give_no_rows(self) -> None:
        camera = random_camera(0)
        scene = random_scene(0, camera)
        view = prepare_view(scene, camera)
        none = torch.zeros(0, dtype=torch.long)
        assert blending_weights(view, none).offsets.tolist() == [0]
        assert render(scene, view, none).rgb.shape == (0, 3)
        assert render_codes(view, random_codes(0, scene.num_gaussians), none)[0].shape == (0, 19)


class TestBadInput:
    @pytest.mark.parametrize("pixel", [-1, 53 * 38])
    def test_a_pixel_outside_the_image_is_refused(self, pixel: int) -> None:
        camera = random_camera(0)
        view = prepare_view(random_scene(0, camera), camera)
        with pytest.raises(ValueError, match=r"pixel_ids must be between 0 and 2013 \(53x38 pixels\)"):
            blending_weights(view, torch.tensor([3, pixel]))

    def test_codes_of_another_scene_are_refused(self) -> None:
        camera = random_camera(0)
        view = prepare_view(random_scene(0, camera), camera)
        with pytest.raises(ValueError, match="codes has 7 rows, but the view has 120 Gaussians"):
            render_codes(view, random_codes(0, 7))
        with pytest.raises(ValueError, match="codes has 7 rows, but the view has 120 Gaussians"):
            splat_codes(blending_weights(view), random_codes(0, 7))


def test_num_bytes_of_a_view_counts_its_tensors() -> None:
    camera = random_camera(0)
    view = prepare_view(random_scene(0, camera), camera)
    visible, instances = view.gaussian_ids.numel(), view.tile_rows.numel()
    assert view.num_bytes == visible * (8 * 4 + 4) + (4 * 3 + 1) * 4 + instances * 4


@pytest.mark.slow
def test_kernels_compile_for_cuda(tmp_path_factory: pytest.TempPathFactory) -> None:
    import warp as wp

    from lightning_modules.functional.kernels import blending, projection, splatting

    if not wp.get_cuda_supported_archs():
        pytest.skip("this build of Warp has no CUDA compiler")
    blending.blending_kernels(1)
    for module in (projection, splatting, blending):
        folder = tmp_path_factory.mktemp("kernels")
        wp.compile_aot_module(wp.get_module(module.__name__), arch=80, module_dir=str(folder))
        assert any(path.suffix in {".cubin", ".ptx"} for path in folder.iterdir())
