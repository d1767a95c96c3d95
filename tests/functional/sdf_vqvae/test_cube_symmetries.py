import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.sdf_vqvae.cube_symmetries import (
    CUBE_SYMMETRIES,
    CubeSymmetry,
    turn_coords,
    turn_sparse_sdf,
)

symmetries = st.sampled_from(CUBE_SYMMETRIES)


def points(resolution: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(resolution**3, generator=generator)[:20].sort().values
    return torch.stack([keys // resolution**2, keys // resolution % resolution, keys % resolution], dim=1).int()


def matrix(symmetry: CubeSymmetry) -> torch.Tensor:
    signs = 1 - 2 * torch.tensor(symmetry.mirrored, dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64)[list(symmetry.axes)] * signs[:, None]


def test_there_are_48_and_the_first_leaves_all_as_it_is():
    assert len(set(CUBE_SYMMETRIES)) == 48
    assert torch.equal(turn_coords(points(7), CUBE_SYMMETRIES[0], 7), points(7))
    rotations = [symmetry for symmetry in CUBE_SYMMETRIES if matrix(symmetry).det() > 0]
    assert len(rotations) == 24


@settings(deadline=None)
@given(symmetries, st.integers(2, 9))
def test_grid_points_move_as_their_positions_do(symmetry, resolution):
    coords = points(resolution)
    position = 2 * coords.double() / (resolution - 1) - 1
    turned = 2 * turn_coords(coords, symmetry, resolution).double() / (resolution - 1) - 1
    torch.testing.assert_close(turned, position @ matrix(symmetry).T)


@settings(deadline=None)
@given(symmetries, symmetries)
def test_one_after_another_is_one_of_them(second, first):
    coords = points(6)
    both = turn_coords(turn_coords(coords, first, 6), second, 6)
    (one,) = [s for s in CUBE_SYMMETRIES if torch.equal(matrix(s), matrix(second) @ matrix(first))]
    assert torch.equal(turn_coords(coords, one, 6), both)


def test_each_moves_a_point_of_no_symmetry_elsewhere():
    moved = [tuple(turn_coords(torch.tensor([[0, 1, 3]]), s, 8)[0].tolist()) for s in CUBE_SYMMETRIES]
    assert len(set(moved)) == 48
    expected = {p for a, b, c in itertools.product((0, 7), (1, 6), (3, 4)) for p in itertools.permutations((a, b, c))}
    assert set(moved) == expected


@settings(deadline=None)
@given(symmetries, st.integers(3, 9), st.integers(0, 99))
def test_distances_stay_with_their_points_and_rows_sorted(symmetry, resolution, seed):
    coords = points(resolution, seed)
    sdf = torch.rand(len(coords), generator=torch.Generator().manual_seed(seed))
    turned, distances = turn_sparse_sdf(coords, sdf, symmetry, resolution)
    x, y, z = turned.long().unbind(1)
    assert ((x * resolution + y) * resolution + z).diff().min() > 0
    where = {tuple(row): value for row, value in zip(turned.tolist(), distances.tolist(), strict=True)}
    expected = turn_coords(coords, symmetry, resolution)
    assert where == {tuple(row): value for row, value in zip(expected.tolist(), sdf.tolist(), strict=True)}
    (inverse,) = [s for s in CUBE_SYMMETRIES if torch.equal(matrix(s), matrix(symmetry).T)]
    back, original = turn_sparse_sdf(turned, distances, inverse, resolution)
    assert torch.equal(back, coords)
    assert torch.equal(original, sdf)
