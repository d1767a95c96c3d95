import pytest
import torch

from lightning_modules.functional.colour_maps import contact_sheet, feature_colours, heat_picture, pca_of_atoms, turbo


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
