import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.depth_autoencoder.masked_depth_losses import (
    depth_difference,
    depth_ratio,
    gradient_difference,
    masked_mean,
)


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.rand(2, 1, 5, 6, requires_grad=True), torch.rand(2, 1, 5, 6), torch.rand(2, 1, 5, 6) > 0.4


@pytest.mark.parametrize("kind", ["l1", "huber"])
def test_the_masked_mean_equals_torchs_loss_over_the_valid_pixels_in_value_and_gradient(maps, kind):
    predicted, target, valid = maps
    ours = masked_mean(depth_difference(predicted, target, valid, kind=kind, huber_delta=0.2), valid)
    if kind == "l1":
        theirs = F.l1_loss(predicted[valid], target[valid])
    else:
        theirs = F.huber_loss(predicted[valid], target[valid], delta=0.2) / 0.2
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, predicted), torch.autograd.grad(theirs, predicted))


def test_losses_ignore_what_invalid_pixels_hold(maps):
    predicted, target, valid = maps
    broken = torch.where(valid, target, float("nan"))
    for loss in (depth_difference, lambda *args: gradient_difference(*args)[0]):
        torch.testing.assert_close(loss(predicted, broken, valid), loss(predicted, target, valid))
        (gradient,) = torch.autograd.grad(loss(predicted, broken, valid).sum(), predicted)
        assert (gradient[~valid] == 0).all()


def test_the_gradient_difference_equals_a_loop_over_pairs(maps):
    predicted, target, valid = maps
    values, pairs = gradient_difference(predicted, target, valid)
    total, count = torch.zeros(()), 0
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(6)).tolist():
        for dy, dx in ((0, 1), (1, 0)):
            if y + dy < 5 and x + dx < 6 and valid[b, 0, y, x] and valid[b, 0, y + dy, x + dx]:
                step = predicted[b, 0, y + dy, x + dx] - predicted[b, 0, y, x]
                total = total + (step - (target[b, 0, y + dy, x + dx] - target[b, 0, y, x])).abs()
                count += 1
    assert pairs.sum() == count
    torch.testing.assert_close(values.sum(), total)
    torch.testing.assert_close(
        torch.autograd.grad(values.sum(), predicted), torch.autograd.grad(total, predicted), atol=1e-6, rtol=1e-6
    )


def test_an_offset_has_no_gradient_difference(maps):
    _, target, valid = maps
    assert gradient_difference(target + 0.5, target, valid)[0].max() < 1e-6


def test_the_mean_over_an_empty_mask_is_zero(maps):
    predicted, target, valid = maps
    loss = masked_mean(depth_difference(predicted, target, valid & False), valid & False)
    assert loss == 0
    assert torch.autograd.grad(loss, predicted)[0].abs().max() == 0


def test_the_ratio_is_symmetric_and_one_for_equal_depths():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 1.5])
    torch.testing.assert_close(depth_ratio(a, b), torch.tensor([1.0, 2.0, 2.0]))
    torch.testing.assert_close(depth_ratio(a, b), depth_ratio(b, a))
