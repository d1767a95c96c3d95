import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_modules.functional.collectives import broadcast_from_first, gather_rows
from lightning_modules.functional.language_field.lifting import MaskWeights
from lightning_modules.functional.language_field.mask_table import gather_mask_table


def view(view_id):
    """Masks of one view: features and weights that tell where they came from."""
    generator = torch.Generator().manual_seed(view_id)
    count = 1 + view_id % 3
    features = torch.randn(count, 4, generator=generator)
    dense = torch.rand(5, count, generator=generator).round(decimals=2)
    gaussians, masks = dense.nonzero().T
    weights = MaskWeights(gaussians.int(), masks.int(), dense[gaussians, masks], 5, count)
    return features, weights


def table(view_ids):
    features, weights = zip(*[view(view_id) for view_id in view_ids], strict=True)
    return gather_mask_table(list(features), list(view_ids), [list(weights), list(weights)])


def dense(weights):
    matrix = torch.zeros(weights.num_gaussians, weights.num_masks)
    return matrix.index_put_((weights.gaussian_ids.long(), weights.mask_ids.long()), weights.weights)


def test_one_process_joins_its_views_in_order():
    result = table([0, 2, 4])
    features, weights = zip(*[view(view_id) for view_id in (0, 2, 4)], strict=True)
    assert torch.equal(result.features, torch.cat(features))
    assert result.view_ids.tolist() == [0, 2, 2, 2, 4, 4]
    for level in result.weights:
        assert torch.equal(dense(level), torch.cat([dense(part) for part in weights], dim=1))


def check_process(rank, port, whole):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    result = table([[0, 2, 4], [1, 3]][rank])
    for ours, theirs in zip(result.weights, whole.weights, strict=True):
        for column, expected in zip(ours, theirs, strict=True):
            assert torch.equal(torch.as_tensor(column), torch.as_tensor(expected))
    assert torch.equal(result.features, whole.features)
    assert torch.equal(result.view_ids, whole.view_ids)
    uneven = gather_rows(torch.full((rank * 2, 3), float(rank)))
    assert [len(part) for part in uneven] == [0, 2]
    assert broadcast_from_first(torch.tensor([rank == 0])).all()
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_with_uneven_shares_get_the_table_of_one(free_port):
    mp.spawn(check_process, (free_port, table(range(5))), nprocs=2)
