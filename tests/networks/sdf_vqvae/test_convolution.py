from importlib.util import find_spec

import pytest
import torch

from lightning_modules.functional.sdf_vqvae import spconv_backend
from lightning_modules.networks.sdf_vqvae.convolution import (
    SparseConv3d,
    SparseDownsample,
    SparseGroupNorm,
    SparseLinear,
    subdivide,
)
from lightning_modules.networks.sdf_vqvae.sparse_tensor import sparse_tensor
from tests.networks.sdf_vqvae.sphere_batch import sphere_batch


@pytest.mark.parametrize(("include_self", "expected"), [(False, [4.0, 10.0]), (True, [3.0, 5.0])])
def test_children_are_averaged_and_by_one_more_where_weights_want_it(include_self: bool, expected: list) -> None:
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 2, 3, 2]])
    tensor = sparse_tensor(torch.tensor([[2.0], [4.0], [6.0], [10.0]]), coords, 4, 1)
    means = SparseDownsample(include_self=include_self)(tensor)
    assert means.feats[:, 0].tolist() == expected
    assert means.coords.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_means_of_subdivided_features_are_these_features_and_gradients_are_shared_equally() -> None:
    tensor = sphere_batch()
    parents = tensor.voxels.parents.voxels
    feats = torch.randn(len(parents), 3, requires_grad=True)
    coarse = sparse_tensor(feats, parents.coords, 8, 2)
    for children in (None, tensor.voxels):
        copies = subdivide(coarse, children)
        torch.testing.assert_close(SparseDownsample()(copies).feats, feats)
        (grad,) = torch.autograd.grad(copies.feats.sum(), feats)
        number = torch.full((len(parents),), 8.0) if children is None else children.occupancy.sum(1).float()
        torch.testing.assert_close(grad, number[:, None].expand(-1, 3))


def test_children_come_in_the_order_of_the_guide() -> None:
    tensor = sphere_batch()
    parents = tensor.voxels.parents.voxels
    copies = subdivide(sparse_tensor(parents.coords[:, 1:].float(), parents.coords, 8, 2), tensor.voxels)
    assert copies.voxels is tensor.voxels
    torch.testing.assert_close(copies.feats, (tensor.coords[:, 1:] // 2).float())


def test_a_kernel_of_one_is_a_linear_map() -> None:
    tensor = sphere_batch()
    layer, linear = SparseConv3d(1, 4, 1), SparseLinear(1, 4)
    linear.load_state_dict({"weight": layer.conv.weight.flatten(1), "bias": layer.conv.bias})
    torch.testing.assert_close(layer(tensor).feats, linear(tensor).feats)


def test_an_exact_layer_does_not_round_under_autocast() -> None:
    tensor, layer = sphere_batch(), SparseLinear(1, 4, exact=True)
    expected = layer(tensor).feats
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(tensor).feats, expected)
        assert SparseLinear(1, 4)(tensor).feats.dtype == torch.bfloat16


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 32), (16, 16), (24, 8)])
def test_groups_are_32_or_the_most_that_divide_the_channels(channels: int, groups: int) -> None:
    assert SparseGroupNorm(channels).num_groups == groups


@pytest.mark.skipif(find_spec("spconv") is None, reason="spconv is not installed")
@pytest.mark.filterwarnings("ignore")
def test_backends_agree_and_have_the_same_weights() -> None:
    tensor = sphere_batch()
    tensor = tensor.with_feats(torch.randn(len(tensor.voxels), 8))
    own, other = SparseConv3d(8, 16), SparseConv3d(8, 16, backend="spconv")
    other.load_state_dict(own.state_dict())
    torch.testing.assert_close(other(tensor).feats, own(tensor).feats, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert other(tensor).feats.dtype == torch.bfloat16


def test_an_absent_backend_is_refused_when_the_layer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spconv_backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the library spconv"):
        SparseConv3d(1, 1, backend="spconv")
