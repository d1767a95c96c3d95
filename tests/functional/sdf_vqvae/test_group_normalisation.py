import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.group_normalisation import group_normalisation, row_layout, shape_sums


def norm_of_each_shape(feats: Tensor, weight: Tensor, bias: Tensor, counts: list[int], num_groups: int) -> Tensor:
    shapes = [
        F.group_norm(shape.t()[None], num_groups, weight, bias)[0].t() for shape in feats.split(counts) if len(shape)
    ]
    return torch.cat(shapes)


def shape_ids_of(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@pytest.mark.parametrize("counts", [[700], [300, 1, 513], [256, 0, 90, 0]])
@pytest.mark.parametrize("num_groups", [1, 4, 16])
def test_values_and_gradients_are_those_of_each_shape_alone(counts: list[int], num_groups: int) -> None:
    feats = (torch.randn(sum(counts), 16) * 3 + 5).requires_grad_()
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    output_grad = torch.randn(sum(counts), 16)
    leaves = (feats, weight, bias)
    counts_left = [count for count in counts if count != 1 or num_groups < 16]
    output = group_normalisation(*leaves, row_layout(shape_ids_of(counts), len(counts)), num_groups)
    grads = torch.autograd.grad(output, leaves, output_grad)
    if counts_left != counts:  # F.group_norm refuses one value per channel, whose norm is 0
        torch.testing.assert_close(output[300], bias)
        return
    expected = norm_of_each_shape(*leaves, counts, num_groups)
    expected_grads = torch.autograd.grad(expected, leaves, output_grad)
    for value, truth in zip((output, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(value, truth, rtol=2e-5, atol=2e-5 * float(truth.detach().abs().max()))


def test_gradients_pass_finite_differences() -> None:
    layout = row_layout(shape_ids_of([5, 3]), 2)
    leaves = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((8, 6), (6,), (6,))]
    assert torch.autograd.gradcheck(lambda *leaves: group_normalisation(*leaves, layout, 3), leaves)


def test_statistics_of_bfloat16_are_float32() -> None:
    feats = torch.randn(2000, 32) + 40
    layout = row_layout(torch.zeros(2000, dtype=torch.long), 1)
    rounded = feats.bfloat16()
    expected = group_normalisation(rounded.float(), torch.ones(32), torch.zeros(32), layout, 8)
    output = group_normalisation(rounded, torch.ones(32), torch.zeros(32), layout, 8)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-2)


def test_sums_of_many_rows_keep_their_digits() -> None:
    values = torch.full((300_000, 1), 0.1)
    layout = row_layout(shape_ids_of([299_000, 1000]), 2)
    expected = torch.tensor([[299_000.0], [1000.0]], dtype=torch.float64) * float(values[0, 0])
    torch.testing.assert_close(shape_sums(values, layout), expected, rtol=5e-6, atol=0)


def test_no_rows_stay_no_rows() -> None:
    layout = row_layout(torch.zeros(0, dtype=torch.long), 2)
    assert group_normalisation(torch.zeros(0, 8), torch.ones(8), torch.zeros(8), layout, 4).shape == (0, 8)
