import pytest
import torch

from lightning_modules.functional.sdf_vqvae.neighbour_maps import child_coords, parent_rows
from lightning_modules.functional.sdf_vqvae.sparse_alignment import decoded_rows, searched_rows
from tests.functional.sdf_vqvae.random_voxels import random_voxels, shuffled_within_shapes


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_by_structure_are_those_that_a_search_finds(levels: int, shuffle: bool) -> None:
    coords = random_voxels([600, 0, 500], 16)
    coords = shuffled_within_shapes(coords) if shuffle else coords
    latents, rows, resolution = coords, torch.arange(len(coords)), 16
    for _ in range(levels):
        latents, parents = parent_rows(latents, resolution)
        rows, resolution = parents[rows], resolution // 2
    decoded = latents
    for _ in range(levels):
        decoded = child_coords(decoded).flatten(0, 1)
    found = searched_rows(coords, decoded, 16)
    by_dictionary = {tuple(voxel): row for row, voxel in enumerate(decoded.tolist())}
    assert found.tolist() == [by_dictionary[tuple(voxel)] for voxel in coords.tolist()]
    assert decoded_rows(rows, coords, levels).tolist() == found.tolist()


def test_voxels_that_are_not_there_are_marked() -> None:
    coords = random_voxels([20], 4)
    assert searched_rows(coords, coords[5:], 4).tolist() == [-1] * 5 + list(range(15))
    assert searched_rows(coords, coords[:0], 4).tolist() == [-1] * 20
    assert searched_rows(coords[:0], coords, 4).tolist() == []
