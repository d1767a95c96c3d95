import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.voxel_budget import OrderedBatches, ShapeDraw, VoxelBudgetBatches, packed

VOXELS = [int(n) for n in torch.randint(5, 60, (57,), generator=torch.Generator().manual_seed(0))]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_every_shape_is_packed_once_and_no_batch_is_over_the_budget(voxels, most):
    batches = packed(range(len(voxels)), voxels, most)
    assert sorted(position for batch in batches for position in batch) == list(range(len(voxels)))
    for batch in batches:
        assert len(batch) == 1 or sum(voxels[position] for position in batch) <= most


def test_batches_are_nearly_full():
    batches = packed(range(len(VOXELS)), VOXELS, 200)
    assert len(batches) <= 1.15 * sum(VOXELS) / 200 + 1


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_all_processes_have_as_many_batches_in_every_epoch(num_processes):
    samplers = [VoxelBudgetBatches(VOXELS, 200, 5, num_processes, rank) for rank in range(num_processes)]
    lengths = {len(sampler) for sampler in samplers}
    for epoch in range(6):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        lengths |= {len(share) for share in shares}
        assert {draw.epoch for share in shares for draw in share} == {epoch}
        seen = [position for share in shares for draw in share for position in draw.positions]
        assert len(set(seen)) >= 0.9 * len(VOXELS)
    assert len(lengths) == 1


def test_the_first_epoch_holds_every_shape():
    share = list(VoxelBudgetBatches(VOXELS, 200, 0))
    assert {position for draw in share for position in draw.positions} == set(range(len(VOXELS)))


def test_more_processes_than_batches_share_them():
    shares = [list(VoxelBudgetBatches([3, 4], 100, 0, 3, rank)) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    assert all(sorted(share[0].positions) == [0, 1] for share in shares)


def test_batches_are_a_function_of_seed_and_epoch_alone():
    def batches(seed: int, epoch: int) -> list[ShapeDraw]:
        sampler = VoxelBudgetBatches(VOXELS, 200, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = batches(3, 7)
    torch.manual_seed(2)
    assert batches(3, 7) == first
    assert batches(3, 8) != first
    assert [draw.positions for draw in batches(4, 7)] != [draw.positions for draw in first]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_evaluation_sees_every_shape_once_and_a_large_one_alone(num_processes, monkeypatch):
    shares = []
    for rank in range(num_processes):
        monkeypatch.setattr("datamodules.samplers.process_rank", lambda rank=rank: (num_processes, rank))
        sampler = OrderedBatches([10, 500, 20, 30], 50)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    positions = [draw.positions for share in shares for draw in share]
    assert sorted(position for batch in positions for position in batch) == [0, 1, 2, 3]
    assert (1,) in positions
    assert {draw.epoch for share in shares for draw in share} == {-1}
