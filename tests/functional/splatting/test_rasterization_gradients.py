import pytest
import torch

from lightning_modules.functional.language_field.sparse_codes import densify_codes
from lightning_modules.functional.splatting import rasterization_reference
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import (
    blending_weights,
    prepare_view,
    splat_codes,
    splat_dense,
    transpose_splat,
)
from tests.functional.random_scenes import as_float64, facing_camera, random_camera, random_codes, random_scene

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("active", "num_channels"), [(3, 16), (12, 192), (5, 19)])
def test_splatted_codes_equal_the_twin_in_value_and_gradient(seed: int, active: int, num_channels: int) -> None:
    camera = random_camera(seed)
    scene = random_scene(seed, camera)
    codes = random_codes(seed, scene.num_gaussians, active, num_channels)
    pixels = torch.randperm(camera.num_pixels, generator=torch.Generator().manual_seed(seed))[:300]
    wide_scene, wide_camera = as_float64(scene, camera)
    projected = rasterization_reference.project_gaussians(wide_scene, wide_camera)
    blending = rasterization_reference.blend(wide_scene, projected, wide_camera, pixels)
    pixels = pixels[~blending.is_ambiguous]

    values = codes.values.clone().requires_grad_()
    weight_map = splat_codes(blending_weights(prepare_view(scene, camera), pixels), codes._replace(values=values))
    wide_values = codes.values.double().requires_grad_()
    expected = rasterization_reference.splat_codes(wide_scene, wide_camera, codes._replace(values=wide_values), pixels)
    torch.testing.assert_close(weight_map, expected.float(), atol=5e-5, rtol=1e-4)

    upstream = torch.randn(weight_map.shape)
    (gradient,) = torch.autograd.grad(weight_map, values, upstream)
    (wanted,) = torch.autograd.grad(expected, wide_values, upstream.double())
    assert wanted.abs().max() > 1
    torch.testing.assert_close(gradient, wanted.float(), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 87, 192])
def test_dense_splat_and_its_transpose_equal_the_matrix_products(channels: int) -> None:
    camera = random_camera(1)
    scene = random_scene(1, camera)
    weights = blending_weights(prepare_view(scene, camera))
    rows = torch.repeat_interleave(weights.offsets.diff())
    matrix = torch.zeros(camera.num_pixels, scene.num_gaussians).index_put(
        (rows, weights.gaussian_ids.long()), weights.weights, accumulate=True
    )
    values = torch.randn(scene.num_gaussians, channels, requires_grad=True)
    maps = torch.randn(camera.num_pixels, channels, requires_grad=True)

    blended = splat_dense(weights, values)
    torch.testing.assert_close(blended, matrix @ values, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(blended, values, maps.detach())
    torch.testing.assert_close(gradient, matrix.T @ maps, atol=1e-4, rtol=1e-5)

    gathered = transpose_splat(weights, maps)
    torch.testing.assert_close(gathered, matrix.T @ maps, atol=1e-4, rtol=1e-5)
    (gradient,) = torch.autograd.grad(gathered, maps, values.detach())
    torch.testing.assert_close(gradient, matrix @ values, atol=1e-5, rtol=1e-5)


def test_dense_splat_of_densified_codes_equals_splat_of_codes() -> None:
    camera = random_camera(2)
    scene = random_scene(2, camera)
    weights = blending_weights(prepare_view(scene, camera))
    codes = random_codes(2, scene.num_gaussians)
    torch.testing.assert_close(splat_dense(weights, densify_codes(codes)), splat_codes(weights, codes))


def test_rows_of_another_size_are_refused() -> None:
    camera = random_camera(0)
    weights = blending_weights(prepare_view(random_scene(0, camera), camera))
    with pytest.raises(ValueError, match="values has 5 rows, but the view has 120 Gaussians"):
        splat_dense(weights, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="maps has 5 rows, but the view has 2014 pixels"):
        transpose_splat(weights, torch.zeros(5, 2))


@pytest.mark.parametrize("empty", ["pixels", "gaussians"])
def test_gradients_of_nothing_are_zero(empty: str) -> None:
    camera = random_camera(0)
    scene = random_scene(0, camera, num_gaussians=9)
    if empty == "gaussians":
        scene = scene._replace(opacity_logits=torch.full((9,), -20.0))
    pixels = torch.zeros(0, dtype=torch.long) if empty == "pixels" else None
    weights = blending_weights(prepare_view(scene, camera), pixels)
    codes = random_codes(0, 9)
    values = codes.values.clone().requires_grad_()
    dense = torch.randn(9, 4, requires_grad=True)
    splat_codes(weights, codes._replace(values=values)).sum().backward()
    splat_dense(weights, dense).sum().backward()
    assert torch.equal(values.grad, torch.zeros(9, 5))
    assert torch.equal(dense.grad, torch.zeros(9, 4))


def test_the_twin_has_the_gradients_of_finite_differences() -> None:
    camera = facing_camera(width=6, height=4, focal=6.0)
    scene, camera = as_float64(random_scene(1, camera, num_gaussians=6), camera)
    pixels = torch.arange(0, 24, 3)
    codes = random_codes(1, 6, active=2, num_channels=3)
    projected = rasterization_reference.project_gaussians(scene, camera)
    blending = rasterization_reference.blend(scene, projected, camera, pixels)
    assert not blending.is_ambiguous.any()
    assert (blending.weights > 0).sum() > 6

    def outputs(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *scene_parameters, values = parameters
        moved = GaussianScene(*scene_parameters)
        rendered = rasterization_reference.render(moved, camera, pixels)
        return *rendered, rasterization_reference.splat_codes(moved, camera, codes._replace(values=values), pixels)

    inputs = [parameter.requires_grad_() for parameter in (*scene, codes.values.double())]
    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)
