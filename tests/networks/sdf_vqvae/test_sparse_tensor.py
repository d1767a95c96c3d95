import gc
import weakref

import pytest
import torch

from lightning_modules.functional.sdf_vqvae.sparse_alignment import searched_rows
from lightning_modules.networks.sdf_vqvae.sparse_tensor import Voxels, checked_voxels, sparse_tensor
from tests.functional.sdf_vqvae.random_voxels import random_voxels, shuffled_within_shapes
from tests.networks.sdf_vqvae.sphere_batch import sphere_batch


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ([[0, 0, 0, 8]], r"row 0 is \[0, 0, 0, 8\].*x, y and z 0 to 7"),
        ([[0, 0, 0, 0], [0, -1, 0, 0]], r"row 1 is \[0, -1, 0, 0\]"),
        ([[2, 0, 0, 0]], "shape 0 to 1"),
        ([[1, 0, 0, 0], [0, 0, 0, 0]], "must follow each other"),
        ([[0, 5, 0, 0], [0, 1, 2, 3], [0, 5, 0, 0]], r"1 coordinates are doubled, for one \[0, 5, 0, 0\]"),
    ],
)
def test_bad_coordinates_are_refused_with_the_row(coords: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_voxels(torch.tensor(coords), 8, 2)


def test_rows_in_any_order_within_a_shape_are_taken_as_they_are() -> None:
    coords = shuffled_within_shapes(random_voxels([60, 40], 8))
    voxels = checked_voxels(coords, 8, 2)
    assert not voxels.is_sorted
    assert checked_voxels(random_voxels([60, 40], 8), 8, 2).is_sorted
    torch.testing.assert_close(voxels.coords, coords)


def test_maps_are_built_once_and_shared_by_the_tensors_of_a_level() -> None:
    tensor = sphere_batch()
    other = tensor.with_feats(tensor.feats * 2)
    assert other.voxels.neighbours is tensor.voxels.neighbours
    assert other.voxels.parents.voxels is tensor.voxels.parents.voxels
    assert other.voxels.windows(8, 4) is tensor.voxels.windows(8, 4)
    assert other.voxels.windows(8, 4) is not tensor.voxels.windows(8, 0)


def test_kept_children_lead_back_to_their_parents_without_a_search() -> None:
    parents = Voxels(random_voxels([30, 0, 20], 4), 4, 3, is_sorted=True)
    kept = torch.rand(50, 8) > 0.5
    children = parents.children(kept)
    assert children.parents.voxels is parents
    expected = searched_rows(torch.cat([children.coords[:, :1], children.coords[:, 1:] // 2], 1), parents.coords, 4)
    torch.testing.assert_close(children.parents.rows, expected)
    torch.testing.assert_close(children.occupancy, kept)
    assert children.resolution == 8


def test_all_children_of_all_children_are_the_descendants() -> None:
    voxels = Voxels(random_voxels([9], 4), 4, 1, is_sorted=True)
    descendants = voxels.children().children()
    torch.testing.assert_close(descendants.ancestor_rows(2), torch.arange(9).repeat_interleave(64))
    assert (descendants.coords[:, 1:] // 4 == voxels.coords[descendants.ancestor_rows(2), 1:]).all()


def test_voxels_are_freed_without_the_garbage_collector() -> None:
    tensor = sphere_batch()
    children = tensor.voxels.parents.voxels.children()
    seen = [weakref.ref(voxels) for voxels in (tensor.voxels, tensor.voxels.parents.voxels, children)]
    gc.disable()
    try:
        del tensor, children
        assert [reference() for reference in seen] == [None] * 3
    finally:
        gc.enable()


def test_an_odd_resolution_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="resolution 15 cannot be halved"):
        _ = checked_voxels(torch.tensor([[0, 1, 2, 3]]), 15, 1).parents


def test_no_voxels_are_a_batch_too() -> None:
    tensor = sparse_tensor(torch.zeros(0, 1), torch.zeros(0, 4, dtype=torch.int32), 8, 2)
    assert len(tensor.voxels.parents.voxels) == 0
    assert tensor.voxels.neighbours.shape == (0, 27)
    assert tensor.voxels.layout.counts.tolist() == [0, 0]
