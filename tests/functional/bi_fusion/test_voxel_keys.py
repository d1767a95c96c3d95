import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from lightning_modules.functional.bi_fusion.voxel_keys import find_keys, voxel_centres, voxel_keys


@given(arrays("float32", (20, 3), elements=st.floats(-500, 500, width=32)), st.sampled_from([0.02, 0.05, 0.3]))
def test_a_point_lies_in_the_voxel_of_its_key(points, voxel_size):
    points = torch.from_numpy(points)
    away = (voxel_centres(voxel_keys(points, voxel_size), voxel_size) - points).abs()
    assert away.max() <= voxel_size / 2 + 1e-4


def test_keys_sort_as_cells_do():
    cells = torch.cartesian_prod(*[torch.arange(-3.0, 3)] * 3)
    keys = voxel_keys(cells + 0.5, 1.0)
    assert torch.equal(keys, keys.sort().values)
    assert len(keys.unique()) == len(cells)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e6])
def test_points_out_of_reach_are_refused(bad):
    with pytest.raises(ValueError, match="Leave such points out"):
        voxel_keys(torch.tensor([[0.0, 0, 0], [bad, 0, 0]]), 1.0)


def test_wanted_keys_are_found_and_others_are_not():
    assert find_keys(torch.tensor([2, 5, 9]), torch.tensor([5, 1, 9, 10, 2])).tolist() == [1, -1, 2, -1, 0]
    assert find_keys(torch.empty(0, dtype=torch.int64), torch.tensor([4])).tolist() == [-1]
