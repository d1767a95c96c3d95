import pytest
import torch
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.window_partition import window_partition, windowed_attention
from tests.functional.sdf_vqvae.random_voxels import random_voxels


def dense_masked_attention(qkv: Tensor, coords: Tensor, window_size: int, shift: int) -> Tensor:
    """Attention among all rows, with minus infinity between voxels of different windows."""
    window = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // window_size], dim=1)
    apart = (window[:, None] != window[None]).any(dim=2)
    queries, keys, values = qkv.unbind(1)
    scores = torch.einsum("nhc,mhc->hnm", queries, keys) / queries.shape[-1] ** 0.5
    weights = scores.masked_fill(apart, -torch.inf).softmax(dim=2)
    return torch.einsum("hnm,mhc->nhc", weights, values).flatten(1)


@pytest.mark.parametrize(("window_size", "shift"), [(4, 0), (4, 2), (8, 4), (16, 0)])
def test_values_and_gradients_are_those_of_masked_dense_attention(window_size: int, shift: int) -> None:
    coords = random_voxels([500, 3, 0, 200], 14)
    qkv = torch.randn(len(coords), 3, 2, 8, requires_grad=True)
    output_grad = torch.randn(len(coords), 16)
    expected = dense_masked_attention(qkv, coords, window_size, shift)
    output = windowed_attention(qkv, window_partition(coords, 14, window_size, shift))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(output, qkv, output_grad)
    (expected_grad,) = torch.autograd.grad(expected, qkv, output_grad)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_every_voxel_has_one_place_and_padding_is_less_than_the_voxels() -> None:
    coords = random_voxels([3000, 2000], 32)
    partition = window_partition(coords, 32, 8, 4)
    rows = torch.cat([batch.rows.flatten() for batch in partition.batches])
    mask = torch.cat([batch.mask.flatten() for batch in partition.batches])
    assert rows[mask].sort().values.tolist() == list(range(5000))
    assert rows[partition.places].tolist() == list(range(5000))
    assert len(rows) < 2 * 5000


def test_a_full_window_is_larger_than_the_last_length_and_still_one() -> None:
    coords = random_voxels([10**3], 10)
    partition = window_partition(coords, 10, 10)
    assert [batch.rows.shape for batch in partition.batches] == [(1, 1000)]


def test_no_voxels_attend_to_nothing() -> None:
    coords = torch.zeros(0, 4, dtype=torch.int32)
    assert windowed_attention(torch.zeros(0, 3, 2, 4), window_partition(coords, 8, 4)).shape == (0, 8)
