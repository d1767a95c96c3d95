import io

import pytest
import torch

from lightning_modules.networks.bi_fusion.memory_bank import MemoryBank


def frames(number: int, seed: int = 0, size: int = 200):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(number):
        points = torch.rand(size, 3, generator=draw) * 0.4 - 0.2
        yield points, torch.randn(size, 6, generator=draw), torch.rand(size, generator=draw)


def test_means_are_those_of_all_observations_at_once():
    bank, seen = MemoryBank(6, voxel_size=0.1), list(frames(7))
    for frame in seen:
        bank.update(*frame)
    points, features, weights = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
    cells = torch.floor(points / 0.1).long()
    voxels, row = torch.unique(cells, dim=0, return_inverse=True)
    sums = torch.zeros(len(voxels), 6, dtype=torch.float64).index_add_(0, row, features * weights[:, None])
    expected = sums / torch.zeros(len(voxels), dtype=torch.float64).index_add_(0, row, weights)[:, None]
    found = bank.recall((voxels + 0.5).float() * 0.1)
    assert len(bank) == len(voxels)
    assert torch.equal(torch.floor(bank.centres() / 0.1).long(), voxels)
    torch.testing.assert_close(found.features.double(), expected, rtol=1e-4, atol=1e-5)


def test_counts_are_of_frames_not_of_points():
    bank = MemoryBank(1, voxel_size=1.0)
    for _ in range(3):
        bank.update(torch.full((5, 3), 0.5), torch.ones(5, 1))
    bank.update(torch.full((1, 3), 1.5), torch.ones(1, 1))
    known = bank.recall(torch.tensor([[0.1, 0.2, 0.3], [1.1, 1.2, 1.3], [7.0, 0, 0]]))
    assert known.counts.tolist() == [3, 1, 0]
    assert known.known.tolist() == [True, True, False]
    assert known.features[:, 0].tolist() == [1.0, 1.0, 0.0]


def test_points_without_confidence_leave_no_trace():
    bank = MemoryBank(2)
    bank.update(torch.rand(4, 3), torch.full((4, 2), torch.nan), torch.zeros(4))
    assert len(bank) == 0
    assert bank.recall(torch.rand(2, 3)).counts.tolist() == [0, 0]


def test_a_frame_that_is_not_finite_is_refused_and_changes_nothing():
    bank = MemoryBank(2)
    bank.update(torch.zeros(1, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        bank.update(torch.zeros(1, 3), torch.full((1, 2), torch.nan))
    assert bank.num_frames == 1
    assert bank.recall(torch.zeros(1, 3)).features.tolist() == [[1.0, 1.0]]


def test_a_stored_bank_goes_on_where_it_stopped():
    seen = list(frames(6))
    whole, first, second = MemoryBank(6), MemoryBank(6), MemoryBank(6)
    for frame in seen:
        whole.update(*frame)
    first.reset("scene0000_00")
    for frame in seen[:3]:
        first.update(*frame)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.scene, second.num_frames) == ("scene0000_00", 3)
    for frame in seen[3:]:
        second.update(*frame)
    for name in ("keys", "features", "weights", "counts", "last_frames"):
        assert torch.equal(getattr(second, name), getattr(whole, name)), name
    with pytest.raises(ValueError, match=r"voxel_size=0\.05"):
        MemoryBank(6, voxel_size=0.1).load_state_dict(first.state_dict())


def test_reset_forgets_the_scene_before():
    bank = MemoryBank(6)
    for frame in frames(2):
        bank.update(*frame)
    bank.reset("next")
    assert (len(bank), bank.num_frames, bank.scene) == (0, 0, "next")
    assert bank.features.untyped_storage().nbytes() == 0  # nor is it saved with the next one


def test_the_least_seen_of_too_many_voxels_go_first():
    bank = MemoryBank(1, voxel_size=1.0, max_voxels=2)
    often, once, late = (torch.tensor([[x + 0.5, 0.5, 0.5]]) for x in range(3))
    for point in (often, once, often, late):
        bank.update(point, torch.ones(1, 1))
    assert bank.recall(torch.cat([often, once, late])).counts.tolist() == [2, 0, 1]


def test_voxels_seen_once_are_forgotten_with_age():
    bank = MemoryBank(1, voxel_size=1.0, max_age=2)
    point, noise = torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[5.5, 0.5, 0.5]])
    bank.update(torch.cat([point, noise]), torch.ones(2, 1))
    for _ in range(3):
        bank.update(point, torch.ones(1, 1))
    assert bank.recall(torch.cat([point, noise])).counts.tolist() == [4, 0]


@pytest.mark.parametrize("setting", [{"channels": 0}, {"voxel_size": 0.0}, {"max_voxels": -1}, {"max_age": -2}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MemoryBank(**{"channels": 4, **setting})
