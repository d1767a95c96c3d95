import math

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss
from scipy.special import eval_legendre, lpmv

from lightning_modules.functional.splatting.spherical_harmonics import (
    spherical_harmonics_basis,
    spherical_harmonics_colors,
)


def unit_directions(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=-1)


def test_bases_equal_scipys_associated_legendre_functions() -> None:
    directions = unit_directions(50)
    z, azimuth = directions[:, 2].numpy(), np.arctan2(directions[:, 1].numpy(), directions[:, 0].numpy())
    expected = []
    for degree in range(4):
        for order in range(-degree, degree + 1):
            m = abs(order)
            norm = math.sqrt((2 * degree + 1) / (4 * math.pi) * math.factorial(degree - m) / math.factorial(degree + m))
            wave = math.sqrt(2) * (np.sin(m * azimuth) if order < 0 else np.cos(m * azimuth)) if order else 1.0
            expected.append(norm * lpmv(m, degree, z) * wave)
    torch.testing.assert_close(spherical_harmonics_basis(directions, 16), torch.from_numpy(np.stack(expected, -1)))


def test_bases_are_orthonormal_over_the_sphere() -> None:
    nodes, node_weights = leggauss(8)  # exact for the products of two bases of degree 3
    azimuth = np.arange(16) * 2 * np.pi / 16
    z, angle = np.meshgrid(nodes, azimuth, indexing="ij")
    radius = np.sqrt(1 - z * z)
    directions = torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle), z], -1)).reshape(-1, 3)
    areas = torch.from_numpy(np.repeat(node_weights, 16) * 2 * np.pi / 16)
    basis = spherical_harmonics_basis(directions, 16)
    torch.testing.assert_close(basis.T @ (areas[:, None] * basis), torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_each_degree_obeys_the_addition_theorem(degree: int) -> None:
    a, b = unit_directions(20), unit_directions(20)
    of_degree = slice(degree**2, (degree + 1) ** 2)
    product = (spherical_harmonics_basis(a, 16) * spherical_harmonics_basis(b, 16))[:, of_degree].sum(-1)
    cosine = (a * b).sum(-1).numpy()
    expected = torch.from_numpy((2 * degree + 1) / (4 * math.pi) * eval_legendre(degree, cosine))
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("num_bases", [1, 4, 9])
def test_fewer_bases_are_the_first_of_all(num_bases: int) -> None:
    directions = unit_directions(5)
    all_bases = spherical_harmonics_basis(directions, 16)
    torch.testing.assert_close(spherical_harmonics_basis(directions, num_bases), all_bases[:, :num_bases])


def test_colour_is_the_sum_of_harmonics_plus_a_half_and_never_negative() -> None:
    coefficients = torch.tensor([[[1.0, -1.0, -3.0]]])
    colour = spherical_harmonics_colors(coefficients, torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(colour, torch.tensor([[0.5 + 0.28209479, 0.5 - 0.28209479, 0.0]]))


def test_colour_of_degree_one_changes_with_the_direction() -> None:
    coefficients = torch.zeros(1, 4, 3)
    coefficients[0, 2, 0] = 1.0  # z
    towards, away = (
        spherical_harmonics_colors(coefficients, torch.tensor([[0.0, 0.0, sign]]))[0, 0].item() for sign in (1.0, -1.0)
    )
    assert towards == pytest.approx(0.5 + 0.48860251)
    assert away == pytest.approx(0.5 - 0.48860251)


def test_a_number_of_coefficients_that_is_no_degree_is_refused() -> None:
    with pytest.raises(ValueError, match="1, 4, 9 or 16 coefficients"):
        spherical_harmonics_basis(torch.tensor([[0.0, 0.0, 1.0]]), 5)
