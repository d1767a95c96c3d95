from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional.sdf_vqvae import spconv_backend
from lightning_modules.functional.sdf_vqvae import submanifold_convolution as own
from lightning_modules.functional.sdf_vqvae.neighbour_maps import neighbour_map, voxel_keys
from lightning_modules.functional.sdf_vqvae.submanifold_convolution import submanifold_convolution
from tests.functional.sdf_vqvae.random_voxels import random_voxels, shuffled_within_shapes

RESOLUTION = 12


def dense_convolution(feats: Tensor, weight: Tensor, bias: Tensor | None, coords: Tensor) -> Tensor:
    """conv3d of the dense grid, read at the active voxels."""
    shape, x, y, z = coords.long().unbind(1)
    grid = feats.new_zeros(int(shape.max()) + 1, *[RESOLUTION] * 3, feats.shape[1])
    grid = grid.index_put((shape, x, y, z), feats).permute(0, 4, 1, 2, 3)
    convolved = F.conv3d(grid, weight.permute(0, 4, 1, 2, 3), bias, padding=1)
    return convolved.permute(0, 2, 3, 4, 1)[shape, x, y, z]


def random_case(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    coords = random_voxels([400, 700], RESOLUTION)
    feats = torch.randn(len(coords), inputs, dtype=dtype, requires_grad=True)
    weight = (torch.randn(outputs, 3, 3, 3, inputs, dtype=dtype) / (20 * inputs) ** 0.5).requires_grad_()
    bias = torch.randn(outputs, dtype=dtype, requires_grad=True)
    return coords, feats, weight, bias, torch.randn(len(coords), outputs, dtype=dtype)


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def neighbours_of(coords: Tensor, is_sorted: bool = True) -> Tensor:
    return neighbour_map(voxel_keys(coords, RESOLUTION), RESOLUTION, is_sorted=is_sorted)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (1, 24), (24, 1)])
@pytest.mark.parametrize("block", [4096, 1099])  # the last block of one row
def test_values_and_gradients_are_those_of_the_dense_convolution(
    inputs: int, outputs: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "_CPU_ROWS", block)
    coords, feats, weight, bias, output_grad = random_case(inputs, outputs)
    expected = dense_convolution(feats, weight, bias, coords)
    expected_grads = torch.autograd.grad(expected, (feats, weight, bias), output_grad)
    output = submanifold_convolution(feats, weight, bias, neighbours_of(coords))
    grads = torch.autograd.grad(output, (feats, weight, bias), output_grad)
    for value, truth in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert relative_error(value, truth) < 2e-6


def test_bfloat16_under_autocast_is_near_and_kernel_gradients_are_summed_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own, "_CPU_ROWS", 100)
    coords, feats, weight, bias, output_grad = random_case(16, 32)
    expected = dense_convolution(feats, weight, bias, coords)
    expected_grads = torch.autograd.grad(expected, (feats, weight, bias), output_grad)
    with torch.autocast("cpu", torch.bfloat16):
        output = submanifold_convolution(feats, weight, bias, neighbours_of(coords))
    assert output.dtype == torch.bfloat16
    grads = torch.autograd.grad(output, (feats, weight, bias), output_grad.bfloat16())
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for value, truth in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert relative_error(value, truth) < 6e-3
    assert not torch.equal(grads[1].bfloat16().float(), grads[1])


def test_rows_in_another_order_give_the_same_features() -> None:
    coords, feats, weight, bias, _ = random_case(8, 8)
    shuffled = shuffled_within_shapes(coords)
    rows = {tuple(voxel): row for row, voxel in enumerate(coords.tolist())}
    order = torch.tensor([rows[tuple(voxel)] for voxel in shuffled.tolist()])
    expected = submanifold_convolution(feats, weight, bias, neighbours_of(coords))[order]
    output = submanifold_convolution(feats[order], weight, bias, neighbours_of(shuffled, is_sorted=False))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_gradients_pass_finite_differences() -> None:
    coords = random_voxels([12], 4)
    neighbours = neighbour_map(voxel_keys(coords, 4), 4, is_sorted=True)
    feats = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: submanifold_convolution(*a, neighbours), (feats, weight, bias))


def test_no_voxels_give_no_rows_and_zero_gradients() -> None:
    weight, bias = torch.randn(4, 3, 3, 3, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    output = submanifold_convolution(torch.zeros(0, 2), weight, bias, torch.zeros(0, 27, dtype=torch.int32))
    assert output.shape == (0, 4)
    output.sum().backward()
    assert weight.grad.abs().sum() == 0
    assert bias.grad.abs().sum() == 0


def test_without_gradients_of_the_features_the_kernel_still_learns() -> None:
    coords, feats, weight, _, output_grad = random_case(4, 6)
    expected = torch.autograd.grad(dense_convolution(feats, weight, None, coords), weight, output_grad)[0]
    output = submanifold_convolution(feats.detach(), weight, None, neighbours_of(coords))
    assert relative_error(torch.autograd.grad(output, weight, output_grad)[0], expected) < 2e-6


@pytest.mark.skipif(find_spec("spconv") is None, reason="spconv is not installed")
@pytest.mark.filterwarnings("ignore")
def test_spconv_gives_the_same_values_and_gradients() -> None:
    coords, feats, weight, bias, output_grad = random_case(16, 24)
    output = submanifold_convolution(feats, weight, bias, neighbours_of(coords))
    grads = torch.autograd.grad(output, (feats, weight, bias), output_grad)
    pairs = spconv_backend.pair_map(coords, RESOLUTION, 2)
    theirs = spconv_backend.submanifold_convolution(feats, weight, bias, pairs)
    their_grads = torch.autograd.grad(theirs, (feats, weight, bias), output_grad)
    for value, truth in zip((theirs, *their_grads), (output, *grads), strict=True):
        assert relative_error(value, truth) < 2e-6


def test_spconv_that_is_absent_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spconv_backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend 'spconv' needs the library spconv.*choose backend 'torch'"):
        spconv_backend.check_spconv()
