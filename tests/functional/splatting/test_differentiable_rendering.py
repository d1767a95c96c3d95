import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting import differentiable_rendering, rasterization, rasterization_reference
from lightning_modules.functional.splatting.differentiable_rendering import TrainingRender, render_with_gradients
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import prepare_view, render
from lightning_modules.functional.splatting.spherical_harmonics import spherical_harmonics_colors
from tests.functional.random_scenes import as_float64, facing_camera, isotropic_scene, random_camera, random_scene

BACKGROUND = torch.tensor([0.2, 0.9, 0.4])


def trainable(scene: GaussianScene) -> GaussianScene:
    return GaussianScene(*(parameter.detach().clone().requires_grad_() for parameter in scene))


def twin(scene: GaussianScene, camera: Camera, screen_offsets: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Colour, depth and alpha of the twin with moved centres; the pixels that rounding decides; the radii."""
    projected = rasterization_reference.project_gaussians(scene, camera)
    ids = projected.gaussian_ids
    projected = projected._replace(centres=projected.centres + screen_offsets[ids])
    blending = rasterization_reference.blend(scene, projected, camera, torch.arange(camera.num_pixels))
    directions = torch.nn.functional.normalize(scene.means[ids] - camera.position, dim=-1)
    colors = spherical_harmonics_colors(scene.spherical_harmonics[ids], directions)
    rgb = blending.weights @ colors + blending.transmittances[:, None] * BACKGROUND.to(colors)
    alpha = blending.weights.sum(1)
    depth = blending.weights @ projected.depths / torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    radii = torch.zeros_like(alpha[:1]).expand(scene.num_gaussians).index_copy(0, ids, projected.radii)
    return (rgb, depth, alpha), blending.is_ambiguous, radii


def loss_gradients(scene: GaussianScene, camera: Camera, seed: int = 0) -> tuple[TrainingRender, list[Tensor]]:
    """A picture and the gradients of a random linear function of all of it."""
    leaves = trainable(scene)
    offsets = torch.zeros(scene.num_gaussians, 2, requires_grad=True)
    rendered = render_with_gradients(leaves, camera, BACKGROUND, screen_offsets=offsets)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(output.shape, generator=generator) for output in rendered[:3]]
    return rendered, list(torch.autograd.grad(rendered[:3], [*leaves, offsets], upstream))


@pytest.mark.parametrize(("seed", "num_bases"), [(0, 1), (1, 4), (2, 9), (3, 16)])
def test_the_picture_is_that_of_the_frozen_scene(seed: int, num_bases: int) -> None:
    camera = random_camera(seed)
    scene = random_scene(seed, camera, num_bases=num_bases)
    expected = render(scene, prepare_view(scene, camera), background=BACKGROUND)
    for actual, wanted in zip(render_with_gradients(scene, camera, BACKGROUND), expected, strict=False):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("output", ["rgb", "depth", "alpha"])
@pytest.mark.parametrize(("seed", "num_bases"), [(0, 1), (1, 4), (2, 9), (3, 16), (4, 4), (5, 16)])
def test_gradients_equal_the_twin(seed: int, num_bases: int, output: str) -> None:
    camera = random_camera(seed)  # rotated, its principal point far from the centre
    scene = random_scene(seed, camera, num_bases=num_bases)  # beyond the borders, and near the camera
    wide_scene, wide_camera = as_float64(scene, camera)
    wide_leaves = trainable(wide_scene)
    wide_offsets = torch.zeros(scene.num_gaussians, 2, dtype=torch.float64, requires_grad=True)
    outputs, is_ambiguous, radii = twin(wide_leaves, wide_camera, wide_offsets)
    leaves = trainable(scene)
    offsets = torch.zeros(scene.num_gaussians, 2, requires_grad=True)
    rendered = render_with_gradients(leaves, camera, BACKGROUND, screen_offsets=offsets)

    is_visible = rendered.radii > 0
    assert torch.equal(rendered.radii[is_visible], radii[is_visible].float())
    wanted_output = outputs[TrainingRender._fields.index(output)]
    upstream = torch.randn(wanted_output.shape)
    upstream[is_ambiguous] = 0
    # Opacities do not depend on colours, nor depths.
    names = [*scene._fields, "screen_offsets"]
    wanted = torch.autograd.grad(wanted_output, [*wide_leaves, wide_offsets], upstream.double(), allow_unused=True)
    actual = torch.autograd.grad(getattr(rendered, output), [*leaves, offsets], upstream, allow_unused=True)
    for name, ours, theirs in zip(names, actual, wanted, strict=True):
        if name == "spherical_harmonics" and output != "rgb":
            assert theirs is None
            assert ours is None or not ours.any()
            continue
        assert theirs.abs().max() > 0.1, name
        assert not ours[~is_visible].any(), name
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name
        tolerance = 2e-4 * float(theirs.abs().max())  # float32 inverts thin covariances no better
        torch.testing.assert_close(ours, theirs.float(), atol=tolerance, rtol=1e-3, msg=lambda text, n=name: n + text)


def test_scenes_of_the_comparison_reach_the_clamp_the_borders_and_the_near_plane() -> None:
    found = torch.zeros(3, dtype=torch.bool)
    for seed in range(6):
        camera = random_camera(seed)
        scene = random_scene(seed, camera, num_bases=4)
        seen = render_with_gradients(scene, camera).radii > 0
        x, y, z = (scene.means @ camera.camera_from_world[:3, :3].T + camera.camera_from_world[:3, 3])[seen].unbind(1)
        column, row = 45 * x / z + 0.4 * 53, 38 * y / z + 0.65 * 38
        is_outside = (column < 0) | (column > 53) | (row < 0) | (row > 38)
        is_clamped = (column < -0.15 * 53) | (column > 1.15 * 53) | (row < -0.15 * 38) | (row > 1.15 * 38)
        found |= torch.stack([is_clamped.any(), is_outside.any(), (z < 0.5).any()])
    assert found.all()


def test_gradients_are_those_of_central_differences() -> None:
    # Gaussians wider than the picture, none opaque: no threshold is near.
    camera = facing_camera(width=19, height=16, focal=16.0)
    scene = random_scene(1, camera, num_gaussians=6, num_bases=4)
    means = torch.tensor([0.0, 0.0, 3.0]) + scene.means.tanh() * 0.5
    scene = scene._replace(
        means=means, opacity_logits=scene.opacity_logits.clamp(-1, 1), log_scales=scene.log_scales.clamp(-0.2, 0.3)
    )
    scene = scene._replace(log_scales=scene.log_scales + 0.4)
    wide_scene, wide_camera = as_float64(scene, camera)
    target = torch.rand(3, camera.num_pixels, 3)

    def loss(rgb: Tensor, depth: Tensor, alpha: Tensor) -> Tensor:
        of_rgb = (rgb - target[0]).square().sum()
        return of_rgb + (depth * target[1, :, 0]).sum() + (alpha * target[2, :, 0]).square().sum()

    leaves = trainable(scene)
    loss(*render_with_gradients(leaves, camera, BACKGROUND)[:3]).backward()
    generator = torch.Generator().manual_seed(0)
    nowhere = torch.zeros(6, 2, dtype=torch.float64)
    for name, leaf in zip(scene._fields, leaves, strict=True):
        direction = torch.randn(leaf.shape, generator=generator)
        step = 1e-4
        losses = []
        for sign in (1, -1):
            moved = wide_scene._replace(**{name: getattr(wide_scene, name) + sign * step * direction})
            outputs, is_ambiguous, _ = twin(moved, wide_camera, nowhere)
            assert not is_ambiguous.any()
            losses.append(loss(*outputs).item())
        expected = (losses[0] - losses[1]) / (2 * step)
        assert abs(expected) > 0.01
        assert (leaf.grad * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


class TestClosedForms:
    centre = 24 * 64 + 32

    def gradient(self, scene: GaussianScene, name: str, pixel: int | None = None) -> Tensor:
        leaves = trainable(scene)
        rgb = render_with_gradients(leaves, facing_camera()).rgb
        (gradient,) = torch.autograd.grad(rgb[self.centre if pixel is None else pixel, 0], getattr(leaves, name))
        return gradient

    def test_opacity_of_one_gaussian(self) -> None:
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.3], [0.7])
        colour = 0.5 + 0.28209479
        assert self.gradient(scene, "opacity_logits").item() == pytest.approx(0.7 * 0.3 * colour, rel=1e-5)

    def test_opacity_in_front_hides_what_is_behind(self) -> None:
        scene = isotropic_scene([[0.0, 0.0, 5.0], [0.0, 0.0, 3.0]], [0.3, 0.2], [0.8, 0.6])
        behind, front = 0.5 + 0.28209479, 0.5 + 2 * 0.28209479
        expected = [0.8 * 0.2 * 0.4 * behind, 0.6 * 0.4 * (front - 0.8 * behind)]
        assert self.gradient(scene, "opacity_logits").tolist() == pytest.approx(expected, rel=1e-5)

    def test_a_mean_moves_its_normal_density(self) -> None:
        # 3 px right of the pixel: dL/dx = -colour alpha dx / variance per pixel moved, at 50 / 4 pixels per metre.
        camera_x = 3 * 4 / 50
        scene = isotropic_scene([[camera_x, 0.0, 4.0]], [0.3], [0.7])
        slope = camera_x / 4
        variance = (50 * 0.3 / 4) ** 2 * (1 + slope**2) + 0.3
        alpha = 0.7 * math.exp(-9 / (2 * variance))
        leaves = trainable(scene)
        offsets = torch.zeros(1, 2, requires_grad=True)
        rgb = render_with_gradients(leaves, facing_camera(), screen_offsets=offsets).rgb
        rgb[self.centre, 0].backward()
        expected = -(0.5 + 0.28209479) * alpha * 3 / variance
        assert offsets.grad[0].tolist() == pytest.approx([expected, 0], rel=1e-4)

    def test_alpha_at_its_most_has_no_gradient(self) -> None:
        scene = isotropic_scene([[0.0, 0.0, 4.0]], [0.3], [0.999])
        assert self.gradient(scene, "opacity_logits").item() == 0
        assert self.gradient(scene, "spherical_harmonics")[0, 0, 0] == pytest.approx(0.99 * 0.28209479, rel=1e-5)

    def test_a_gaussian_that_is_not_reached_has_no_gradient(self) -> None:
        scene = isotropic_scene([[0.0, 0.0, z] for z in (2.0, 3.0, 4.0, 5.0)], [0.3] * 4, [0.95, 0.95, 0.95, 0.6])
        gradient = self.gradient(scene, "spherical_harmonics")[:, 0, 0]
        assert (gradient > 0).tolist() == [True, True, True, False]
        assert self.gradient(scene, "opacity_logits")[3] == 0

    def test_the_normalised_quaternion_has_no_gradient_along_itself(self) -> None:
        camera = random_camera(0)
        scene = random_scene(0, camera)
        _, gradients = loss_gradients(scene, camera)
        along = (gradients[2] * scene.quaternions).sum(1)
        across = gradients[2].norm(dim=1) * scene.quaternions.norm(dim=1)
        assert (along.abs() <= 1e-5 * across + 1e-6).all()
        _, of_twice = loss_gradients(scene._replace(quaternions=2 * scene.quaternions), camera)
        torch.testing.assert_close(2 * of_twice[2], gradients[2])


class TestProperties:
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 10**6))
    def test_the_order_of_the_gaussians_does_not_matter(self, seed: int) -> None:
        camera = random_camera(seed)
        scene = random_scene(seed, camera)
        order = torch.randperm(scene.num_gaussians, generator=torch.Generator().manual_seed(seed))
        rendered, gradients = loss_gradients(scene, camera)
        shuffled, of_shuffled = loss_gradients(GaussianScene(*(parameter[order] for parameter in scene)), camera)
        assert torch.equal(rendered.rgb, shuffled.rgb)
        for ours, others in zip(gradients, of_shuffled, strict=True):
            torch.testing.assert_close(ours[order], others)

    def test_results_are_the_same_bits_on_any_number_of_threads(self, restored_threads: None) -> None:
        camera = random_camera(0, width=149, height=197)
        scene = random_scene(0, camera, num_gaussians=400)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rendered, gradients = loss_gradients(scene, camera)
            results.append((*rendered, *gradients))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_threads_of_one_pixel_as_on_cuda_equal_threads_of_a_tile(
        self, monkeypatch: pytest.MonkeyPatch, restored_threads: None
    ) -> None:
        from lightning_modules.functional.kernels.tile_blending import tile_blending_kernels

        torch.set_num_threads(1)  # a lone lane adds to sums that on CUDA are atomic
        camera = random_camera(5)
        scene = random_scene(5, camera)
        wide, wide_gradients = loss_gradients(scene, camera)
        for module in (rasterization, differentiable_rendering):
            monkeypatch.setattr(module, "image_kernels", lambda device: tile_blending_kernels(1))
        narrow, narrow_gradients = loss_gradients(scene, camera)
        for a, b in zip((*wide, *wide_gradients), (*narrow, *narrow_gradients), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * float(a.detach().abs().max()) + 1e-6, rtol=1e-4)

    def test_descent_along_the_gradients_finds_a_picture_again(self) -> None:
        camera = facing_camera()
        wanted = isotropic_scene(
            [[-0.5, 0.2, 3.0], [0.6, -0.3, 4.0], [0.1, 0.4, 2.5]], [0.4, 0.6, 0.2], [0.8, 0.6, 0.7]
        )
        picture = render_with_gradients(wanted, camera).rgb
        leaves = trainable(GaussianScene(*(x + 0.15 * torch.randn_like(x) for x in wanted)))
        optimizer = torch.optim.Adam(list(leaves), lr=0.03)
        losses = []
        for _ in range(50):
            loss = (render_with_gradients(leaves, camera).rgb - picture).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 50

    def test_a_picture_is_freed_with_its_last_reference(self) -> None:
        import gc
        import weakref

        camera = random_camera(0)
        rendered = render_with_gradients(trainable(random_scene(0, camera)), camera)
        watched = weakref.ref(rendered.rgb.grad_fn)
        gc.disable()
        try:
            del rendered
            assert watched() is None
        finally:
            gc.enable()

    def test_a_quaternion_of_length_zero_is_no_rotation_and_has_no_gradient(self) -> None:
        camera = random_camera(2)
        scene = random_scene(2, camera)
        turned = scene._replace(quaternions=torch.tensor([1.0, 0, 0, 0]).expand(120, 4))
        expected, expected_gradients = loss_gradients(turned, camera)
        rendered, gradients = loss_gradients(scene._replace(quaternions=torch.zeros(120, 4)), camera)
        assert torch.equal(rendered.rgb, expected.rgb)
        assert torch.equal(gradients[1], expected_gradients[1])
        assert not gradients[2].any()

    def test_frozen_parameters_are_left_alone(self) -> None:
        camera = random_camera(2)
        scene = random_scene(2, camera)
        leaf = scene.log_scales.clone().requires_grad_()
        render_with_gradients(scene._replace(log_scales=leaf), camera).rgb.sum().backward()
        _, expected = loss_gradients(scene, camera)
        assert leaf.grad.shape == expected[1].shape
        assert leaf.grad.any()
        assert not render_with_gradients(scene, camera).rgb.requires_grad

    def test_double_precision_scenes_get_double_gradients(self) -> None:
        camera = random_camera(2)
        leaves = trainable(as_float64(random_scene(2, camera), camera)[0])
        render_with_gradients(leaves, camera).rgb.sum().backward()
        assert all(leaf.grad.dtype == torch.float64 for leaf in leaves)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestEmptyInput:
    @pytest.mark.parametrize("num_gaussians", [0, 1, 30])
    def test_a_view_of_nothing_is_background_with_gradients_of_zero(self, num_gaussians: int) -> None:
        camera = facing_camera()
        scene = random_scene(0, camera, num_gaussians)
        scene = scene._replace(means=scene.means - torch.tensor([0.0, 0.0, 100.0]))
        rendered, gradients = loss_gradients(scene, camera)
        assert torch.equal(rendered.rgb, BACKGROUND.expand(camera.num_pixels, 3))
        assert not rendered.depth.any()
        assert not rendered.alpha.any()
        assert not rendered.radii.any()
        for gradient, parameter in zip(gradients, scene, strict=False):
            assert torch.equal(gradient, torch.zeros_like(parameter))


class TestBadInput:
    def test_an_unknown_backend_is_refused(self) -> None:
        camera = facing_camera()
        with pytest.raises(ValueError, match="backend must be 'warp' or 'gsplat', got 'cuda'"):
            render_with_gradients.__wrapped__(random_scene(0, camera), camera, backend="cuda")

    def test_spherical_harmonics_of_no_degree_are_refused(self) -> None:
        camera = facing_camera()
        with pytest.raises(ValueError, match=r"need 1, 4, 9 or 16 coefficients \(degree 0 to 3\), got 25"):
            render_with_gradients(random_scene(0, camera, num_bases=25), camera)


@pytest.mark.slow
def test_gradient_kernels_compile_for_cuda(tmp_path_factory: pytest.TempPathFactory) -> None:
    import warp as wp

    from lightning_modules.functional.kernels import projection_gradients, shading, tile_blending

    if not wp.get_cuda_supported_archs():
        pytest.skip("this build of Warp has no CUDA compiler")
    for lanes in (1, 16):  # both, as in a process that has rendered on both devices
        tile_blending.tile_blending_kernels(lanes)
    for module in (projection_gradients, shading, tile_blending):
        folder = tmp_path_factory.mktemp("kernels")
        wp.compile_aot_module(wp.get_module(module.__name__), arch=80, module_dir=str(folder))
