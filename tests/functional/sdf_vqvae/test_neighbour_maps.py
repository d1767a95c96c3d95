import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.neighbour_maps import (
    child_coords,
    child_occupancy,
    key_coords,
    neighbour_map,
    octants,
    parent_rows,
    voxel_keys,
)
from tests.functional.sdf_vqvae.random_voxels import random_voxels, shuffled_within_shapes


def neighbours_by_dictionary(coords: Tensor) -> Tensor:
    rows = {tuple(voxel): row for row, voxel in enumerate(coords.tolist())}
    offsets = [(dx, dy, dz) for dx in (-1, 0, 1) for dy in (-1, 0, 1) for dz in (-1, 0, 1)]
    table = [
        [rows.get((b, x + dx, y + dy, z + dz), len(rows)) for dx, dy, dz in offsets] for b, x, y, z in coords.tolist()
    ]
    return torch.tensor(table, dtype=torch.int32).reshape(-1, 27)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    resolution=st.integers(1, 6),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    shuffle=st.booleans(),
)
def test_neighbours_are_those_of_the_dictionary(seed: int, resolution: int, shares: list[float], shuffle: bool) -> None:
    coords = random_voxels([int(share * resolution**3) for share in shares], resolution, seed)
    if shuffle:
        coords = shuffled_within_shapes(coords, seed)
    neighbours = neighbour_map(voxel_keys(coords, resolution), resolution, is_sorted=not shuffle)
    torch.testing.assert_close(neighbours, neighbours_by_dictionary(coords))


def test_the_map_is_its_own_mirror_image() -> None:
    coords = random_voxels([300, 200], 9)
    neighbours = neighbour_map(voxel_keys(coords, 9), 9, is_sorted=True).long()
    for offset in range(27):
        here = (neighbours[:, offset] < len(coords)).nonzero()[:, 0]
        there = neighbours[here, offset]
        assert (neighbours[there, 26 - offset] == here).all()


def test_coordinates_come_back_from_keys_of_large_grids() -> None:
    coords = torch.tensor([[0, 0, 0, 0], [3, 1023, 0, 1023], [63, 1023, 1023, 1023]], dtype=torch.int32)
    torch.testing.assert_close(key_coords(voxel_keys(coords, 1024), 1024), coords)


def test_parents_are_the_sorted_distinct_halves_and_hold_their_children() -> None:
    coords = shuffled_within_shapes(random_voxels([100, 0, 60], 8))
    parents, rows = parent_rows(coords, 8)
    halves = torch.cat([coords[:, :1], coords[:, 1:] // 2], dim=1)
    assert parents.tolist() == [list(half) for half in sorted({tuple(half) for half in halves.tolist()})]
    torch.testing.assert_close(parents[rows], halves)
    torch.testing.assert_close(child_coords(parents)[rows, octants(coords)], coords)


def test_children_follow_each_other_with_z_fastest() -> None:
    children = child_coords(torch.tensor([[1, 2, 3, 4]], dtype=torch.int32))
    expected = [[1, 4 + dx, 6 + dy, 8 + dz] for dx in (0, 1) for dy in (0, 1) for dz in (0, 1)]
    assert children[0].tolist() == expected


def test_occupancy_marks_exactly_the_children_that_are_there() -> None:
    coords = random_voxels([90], 8)
    parents, rows = parent_rows(coords, 8)
    occupancy = child_occupancy(rows, octants(coords), len(parents))
    kept = child_coords(parents)[occupancy]
    assert {tuple(voxel) for voxel in kept.tolist()} == {tuple(voxel) for voxel in coords.tolist()}
