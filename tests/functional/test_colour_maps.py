import colorsys

import pytest
import torch

from lightning_modules.functional.colour_maps import (
    class_colours,
    class_picture,
    contact_sheet,
    depth_picture,
    feature_colours,
    heat_picture,
    mask_overlay,
    outlined,
    overlay,
    pca_of_atoms,
    turbo,
)


def test_turbo_equals_matplotlibs():
    colormaps = pytest.importorskip("matplotlib").colormaps
    values = torch.linspace(0, 1, 256).reshape(16, 16)
    expected = torch.from_numpy(colormaps["turbo"](values.numpy())[..., :3]).float()
    torch.testing.assert_close(turbo(values), expected)


def test_values_outside_take_the_colours_of_the_ends():
    ends = turbo(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(turbo(torch.tensor([-3.0, 2.0])), ends)
    torch.testing.assert_close(turbo(torch.tensor([float("nan"), 1.001])), ends)


def test_colours_of_atoms_are_their_principal_components():
    codebook = torch.randn(30, 3).double() @ torch.diag(torch.tensor([5.0, 2.0, 0.1]).double())
    colours = pca_of_atoms(codebook)
    assert colours.min() >= 0
    assert colours.max() <= 1
    # The strongest direction is the first channel, up to sign and the two deviations at which it is cut off.
    inside = (colours[:, 0] > 0) & (colours[:, 0] < 1)
    pair = torch.stack([colours[inside, 0], codebook[inside, 0]])
    assert pair.corrcoef()[0, 1].abs() > 0.99


def test_colours_do_not_depend_on_the_order_of_the_atoms_or_a_rotation_of_the_features():
    codebook, order = torch.randn(20, 8, dtype=torch.float64), torch.randperm(20)
    colours = pca_of_atoms(codebook)
    torch.testing.assert_close(pca_of_atoms(codebook[order]), colours[order])
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    rotated = pca_of_atoms(codebook @ rotation)
    for channel in range(3):  # a rotation may flip the sign of a component
        assert any(torch.allclose(rotated[:, channel], c) for c in (colours[:, channel], 1 - colours[:, channel]))


def test_equal_features_have_equal_colours_in_every_view():
    codebook, weights = torch.randn(10, 6), torch.rand(50, 10)
    weights = weights / weights.sum(1, keepdim=True)
    together = feature_colours(weights, codebook)
    torch.testing.assert_close(feature_colours(weights[7:9], codebook), together[7:9])
    assert not feature_colours(torch.zeros(2, 10), codebook).any()


def test_unused_atoms_are_black_and_change_no_colour():
    codebook = torch.randn(10, 6)
    padded = torch.cat([codebook, torch.zeros(3, 6)])
    torch.testing.assert_close(pca_of_atoms(padded), torch.cat([pca_of_atoms(codebook), torch.zeros(3, 3)]))


def test_a_residual_layer_shifts_the_colours_of_the_first():
    first, differences = torch.randn(10, 6, dtype=torch.float64), 0.01 * torch.randn(10, 6, dtype=torch.float64)
    colours = pca_of_atoms(torch.cat([first, differences]), num_layers=2)
    torch.testing.assert_close(colours[:10], pca_of_atoms(first))
    # Colours of features are affine, so their difference is linear: the same map colours the second layer.
    linear = torch.linalg.lstsq(differences, colours[10:]).solution
    torch.testing.assert_close(differences @ linear, colours[10:])
    inside = ((colours[:10] > 0) & (colours[:10] < 1)).all(1)
    assert inside.sum() >= 2
    features, own = first[inside], colours[:10][inside]
    torch.testing.assert_close((features[:, None] - features) @ linear, own[:, None] - own)


@pytest.mark.parametrize("codebook", [torch.randn(3, 8), torch.zeros(9, 8), torch.randn(9, 2)])
def test_too_little_to_tell_apart_is_black(codebook):
    assert not pca_of_atoms(codebook).any()


def test_a_contact_sheet_lays_images_out_row_by_row():
    images = torch.arange(5)[:, None, None, None].expand(5, 2, 3, 1) + 1
    sheet = contact_sheet(images, columns=3)
    assert sheet.shape == (4, 9, 1)
    assert sheet[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert contact_sheet(images).shape == (4, 9, 1)


def test_a_contact_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0 and 0"):
        contact_sheet(torch.zeros(0, 2, 2, 3))


def test_a_heat_picture_runs_from_its_own_minimum_to_its_own_maximum():
    picture = heat_picture(torch.tensor([[0.50, 0.53], [0.56, 0.62]]))
    ends = turbo(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(picture[0, 0], ends[0])
    torch.testing.assert_close(picture[1, 1], ends[1])


def test_a_heat_picture_of_a_flat_map_is_all_cold():
    assert torch.equal(heat_picture(torch.full((2, 3), 0.5)), turbo(torch.zeros(2, 3)))


def test_an_entry_that_a_level_does_not_use_decides_on_no_colour():
    codebook = torch.randn(12, 6, dtype=torch.float64)
    usage = torch.tensor([1.0] * 8 + [0.0] * 4, dtype=torch.float64)
    colours = pca_of_atoms(codebook, usage=usage)
    torch.testing.assert_close(colours[:8], pca_of_atoms(codebook[:8]))
    assert not colours[8:].any()
    twice = pca_of_atoms(torch.cat([codebook[:8], codebook[:3]]))
    counted = pca_of_atoms(codebook[:8], usage=torch.tensor([2.0] * 3 + [1.0] * 5, dtype=torch.float64))
    torch.testing.assert_close(twice[:8], counted)


def test_a_features_length_does_not_change_its_colour():
    codebook, weights = torch.randn(10, 6), torch.rand(50, 10)
    weights = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(feature_colours(0.3 * weights, codebook), feature_colours(weights, codebook))
    assert feature_colours(1e-3 * weights, codebook).max() < 0.01  # next to nothing is there


def test_an_overlay_leaves_zero_and_covers_one_by_alpha():
    rgb = torch.rand(2, 3, 3)
    values = torch.tensor([[0.0, 0.5, 1.0], [0.25, 1.0, 0.0]])
    share = 0.6 * values[..., None]
    torch.testing.assert_close(overlay(rgb, values, 0.6), rgb * (1 - share) + turbo(values) * share)
    assert torch.equal(overlay(rgb, values, 0.6)[0, 0], rgb[0, 0])


def test_a_mask_is_laid_over_as_three_parts_red():
    rgb, mask = torch.rand(2, 2, 3), torch.tensor([[True, False], [False, True]])
    tinted = mask_overlay(rgb, mask)
    torch.testing.assert_close(tinted[0, 0], 0.7 * rgb[0, 0] + torch.tensor([0.3, 0, 0]))
    assert torch.equal(tinted[0, 1], rgb[0, 1])


def test_an_outline_is_the_border_inside_the_mask_and_not_the_pictures_edge():
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[1:6, 2:6] = True  # reaches the lower edge of the picture
    drawn = outlined(torch.zeros(6, 7, 3), mask)[..., 0].bool()
    expected = mask.clone()
    expected[2:6, 3:5] = False
    assert torch.equal(drawn, expected)


def test_class_colours_are_hues_apart_and_keep_when_more_are_asked_for():
    colours = class_colours(12)
    assert torch.equal(class_colours(40)[:12], colours)
    assert torch.cdist(colours, colours).add(torch.eye(12)).min() > 0.15
    expected = [colorsys.hsv_to_rgb(0, 0.85, 0.95), colorsys.hsv_to_rgb(0.61803398875, 0.6, 0.85)]
    torch.testing.assert_close(colours[:2], torch.tensor(expected))


def test_a_class_picture_colours_classes_and_darkens_the_rest():
    rgb, ids = torch.full((1, 3, 3), 0.5), torch.tensor([[0, 1, -1]])
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    picture = class_picture(rgb, ids, colours, alpha=0.6)
    torch.testing.assert_close(picture[0, :2], 0.6 * colours + 0.2)
    torch.testing.assert_close(picture[0, 2], torch.full((3,), 0.25))


def test_a_depth_picture_runs_from_near_red_to_far_blue():
    depth = torch.linspace(2, 6, 40).expand(10, 40).contiguous()
    covered = torch.ones(10, 40, dtype=torch.bool)
    covered[:, 20] = False
    picture, (near, far) = depth_picture(depth, covered)
    assert near == pytest.approx(2, abs=0.11)
    assert far == pytest.approx(6, abs=0.11)
    ends = turbo(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(picture[0, [0, -1]], ends)
    assert not picture[:, 20].any()
    nothing, bounds = depth_picture(depth, torch.zeros_like(covered))
    assert bounds == (0.0, 0.0)
    assert not nothing.any()
