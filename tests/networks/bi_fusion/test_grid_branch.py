import pytest
import torch
import torch.nn.functional as F

from lightning_modules.networks.bi_fusion.grid_branch import GridAttention, GridBranch, grid_neighbours


def one_by_one(layer: torch.nn.Linear, maps: torch.Tensor) -> torch.Tensor:
    return F.conv2d(maps, layer.weight[:, :, None, None], layer.bias)


def test_the_map_is_that_of_the_named_steps_in_their_order_in_value_and_gradient():
    branch = GridBranch(16, 6)
    tokens = torch.randn(2, 16, 5, 7, requires_grad=True)
    cells = F.pixel_shuffle(one_by_one(branch.mix, tokens), 2)
    finer = F.interpolate(cells, scale_factor=2, mode="bilinear", align_corners=False)
    expected, maps = one_by_one(branch.project, finer), branch(tokens)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 6, 20, 28)
    upstream, wanted = torch.randn_like(expected), [tokens, *branch.parameters()]
    for ours, twin in zip(
        torch.autograd.grad(maps, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours, twin, rtol=1e-3, atol=1e-4)


def test_looking_points_up_copies_no_map():
    maps = GridBranch(16, 6)(torch.randn(2, 16, 4, 4))
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_without_the_mixing_an_even_picture_becomes_a_chequerboard_and_with_it_need_not():
    tokens = torch.randn(1, 16, 1, 1).expand(1, 16, 4, 4)
    plain, mixed = GridBranch(16, 6, mix_before_shuffle=False), GridBranch(16, 6)
    assert not torch.allclose(plain(tokens)[..., 6, 6], plain(tokens)[..., 8, 6], atol=1e-3)
    with torch.no_grad():  # the same four numbers for all four cells of a token
        weight = torch.randn(4, 1, 16).expand(4, 4, 16).reshape(16, 16)
        mixed.mix.weight.copy_(weight)
        mixed.mix.bias.zero_()
    even = mixed(tokens)
    torch.testing.assert_close(even, even[..., :1, :1].expand_as(even))


def test_patches_alone_are_one_linear_map_of_each_token():
    branch = GridBranch(16, 6, upsample=False)
    tokens = torch.randn(2, 16, 3, 3)
    expected = torch.einsum("bdhw,cd->bchw", tokens, branch.project.weight)
    torch.testing.assert_close(branch(tokens), expected + branch.project.bias[:, None, None])


def test_a_neighbourhood_is_three_by_three_inside_its_image():
    ids = grid_neighbours(2, 2, 3, torch.device("cpu"))
    assert ids[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, 3, 4]
    assert ids[4].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    assert ids[6].tolist() == [-1, -1, -1, -1, 6, 7, -1, 9, 10]  # the second image, none of the first


def test_attention_on_the_map_reaches_one_cell_and_keeps_images_apart():
    layer = GridAttention(8, 2)
    maps = torch.randn(2, 8, 5, 5, requires_grad=True)
    out = layer(maps)
    assert out.shape == maps.shape
    (slope,) = torch.autograd.grad(out[0, :, 2, 2].sum(), maps)
    reached = slope.abs().sum(1) > 0
    expected = torch.zeros(2, 5, 5, dtype=torch.bool)
    expected[0, 1:4, 1:4] = True
    assert torch.equal(reached, expected)


def test_the_neck_is_two_layers_of_attention():
    branch = GridBranch(16, 8, use_tiny_sa_2d=True)
    plain = GridBranch(16, 8)
    plain.load_state_dict(branch.state_dict(), strict=False)
    tokens = torch.randn(1, 16, 2, 2)
    torch.testing.assert_close(branch(tokens), branch.neck[1](branch.neck[0](plain(tokens))))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="token_channels is 18; allowed: a multiple of 4"):
        GridBranch(18, 8)
    with pytest.raises(ValueError, match="heads is 3; allowed: divisors of channels, 8"):
        GridBranch(16, 8, use_tiny_sa_2d=True, heads=3)
