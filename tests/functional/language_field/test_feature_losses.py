import torch
import torch.nn.functional as F

from lightning_modules.functional.language_field.feature_losses import absolute_difference_to_targets


def test_equals_langsplats_l1_over_dense_masked_maps():
    weights, codebook = torch.rand(12, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    targets, ids = torch.randn(3, 5), torch.randint(-1, 3, (12,))
    ours = absolute_difference_to_targets(weights, codebook, targets, ids, normalize=True)
    mask = (ids >= 0).float()[:, None]
    dense = (F.normalize(weights @ codebook, dim=1) * mask - targets[ids] * mask).abs()
    torch.testing.assert_close(ours.mean(), dense.mean())
    for ours_grad, dense_grad in zip(
        torch.autograd.grad(ours.mean(), (weights, codebook), retain_graph=True),
        torch.autograd.grad(dense.mean(), (weights, codebook)),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, dense_grad)


def test_pixels_without_a_mask_add_nothing():
    difference = absolute_difference_to_targets(
        torch.rand(4, 6), torch.randn(6, 5), torch.randn(3, 5), torch.tensor([-1, 0, -1, 2])
    )
    assert difference[0] == difference[2] == 0
