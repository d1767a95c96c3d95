import math

import pytest
import torch

from lightning_modules.functional.bi_fusion.geometric_encoding import build_geo_pe, geo_pe_channels
from lightning_modules.functional.bi_fusion.neighbourhood_attention import (
    attend,
    neighbourhood_weights,
    weighted_neighbours,
)

ROWS, NEIGHBOURS, HEADS, DEPTH = 7, 4, 2, 3


def random_ids() -> torch.Tensor:
    ids = torch.stack([torch.randperm(ROWS)[:NEIGHBOURS] for _ in range(ROWS)]).int()
    ids[1, 2:] = -1
    ids[4, 1:] = -1
    return ids


def dense_attention(queries, keys, values, ids, bias):
    """Attention over all rows, where those that are no neighbours are masked out."""
    scores = torch.einsum("ihd,jhd->hij", queries, keys) / math.sqrt(queries.shape[-1])
    mask = torch.full_like(scores, -torch.inf)
    for i, row in enumerate(ids.tolist()):
        for k, j in enumerate(row):
            if j >= 0:
                mask[:, i, j] = bias[i, k]
    return torch.einsum("hij,jhd->ihd", (scores + mask).softmax(-1), values)


def test_attention_equals_dense_attention_with_others_masked_out_in_value_and_gradient():
    ids = random_ids()
    inputs = [torch.randn(ROWS, HEADS, DEPTH, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(ROWS, NEIGHBOURS, HEADS, dtype=torch.float64, requires_grad=True)
    queries, keys, values = inputs
    ours = attend(neighbourhood_weights(queries, keys, ids, bias), values, ids)
    dense = dense_attention(queries, keys, values, ids, bias)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)  # ours has its scores in float32
    upstream = torch.randn_like(dense)
    for mine, twin in zip(
        torch.autograd.grad(ours, [*inputs, bias], upstream),
        torch.autograd.grad(dense, [*inputs, bias], upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-5)


def test_weights_sum_to_one_and_rows_without_neighbours_have_none():
    ids = random_ids()
    ids[3] = -1
    queries, keys = (torch.randn(ROWS, HEADS, DEPTH, requires_grad=True) for _ in range(2))
    weights = neighbourhood_weights(queries, keys, ids)
    expected = torch.ones(ROWS, HEADS)
    expected[3] = 0
    torch.testing.assert_close(weights.sum(1), expected)
    assert (weights[ids < 0] == 0).all()
    (weights**2).sum().backward()
    assert queries.grad.isfinite().all()
    assert (queries.grad[3] == 0).all()


def test_a_bias_of_minus_infinity_leaves_a_neighbour_out():
    ids = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    bias = torch.tensor([[[0.0], [-torch.inf]], [[-torch.inf], [-torch.inf]]])
    weights = neighbourhood_weights(torch.randn(2, 1, 4), torch.randn(2, 1, 4), ids, bias)
    assert weights.flatten().tolist() == [1, 0, 0, 0]


def test_the_sum_of_weighted_neighbours_is_that_of_stored_copies():
    ids = random_ids()
    weights = torch.rand(ROWS, NEIGHBOURS).masked_fill(ids < 0, 0.0).requires_grad_()
    values = torch.randn(ROWS, 5, requires_grad=True)
    ours = weighted_neighbours(weights, values, ids)
    stored = (weights[..., None] * values[ids.clamp_min(0).long()]).sum(1)
    torch.testing.assert_close(ours, stored)
    upstream = torch.randn_like(stored)
    for mine, twin in zip(
        torch.autograd.grad(ours, [weights, values], upstream),
        torch.autograd.grad(stored, [weights, values], upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, twin)


@pytest.mark.parametrize("frequencies", [0, 1, 3])
def test_the_geometric_encoding_has_waves_of_the_stated_lengths(frequencies):
    xyz = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    encoded = build_geo_pe(xyz, frequencies, 2.0)
    assert encoded.shape == (1, geo_pe_channels(3, frequencies))
    torch.testing.assert_close(encoded[:, :3], xyz / 2)
    for axis in range(3):
        for wave in range(frequencies):
            phase = 2 * math.pi * float(xyz[0, axis]) / (2.0 / 2**wave)
            sine = encoded[0, 3 + axis * frequencies + wave]
            cosine = encoded[0, 3 + (3 + axis) * frequencies + wave]
            assert float(sine) == pytest.approx(math.sin(phase), abs=1e-12)
            assert float(cosine) == pytest.approx(math.cos(phase), abs=1e-12)
