import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.embeddings import (
    fit_linear_probe,
    linear_probe,
    nearest_neighbours,
    neighbour_agreement,
)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_neighbours_equal_a_full_sort_of_cosines(block):
    queries, gallery = torch.randn(7, 5), torch.randn(11, 5)
    cosines, rows = nearest_neighbours(queries, gallery, 3, block=block)
    full = F.cosine_similarity(queries[:, None], gallery[None], dim=2).sort(dim=1, descending=True)
    assert torch.equal(rows, full.indices[:, :3])
    torch.testing.assert_close(cosines, full.values[:, :3])


@pytest.mark.parametrize("block", [2, 100])
def test_no_map_is_its_own_neighbour_when_left_out(block):
    maps = torch.randn(6, 4)
    _, rows = nearest_neighbours(maps, maps, 10, leave_out_own=True, block=block)
    assert rows.shape == (6, 5)
    assert not (rows == torch.arange(6)[:, None]).any()


def test_no_queries_have_no_neighbours():
    cosines, rows = nearest_neighbours(torch.zeros(0, 4), torch.randn(6, 4), 3)
    assert cosines.shape == rows.shape == (0, 3)


def test_agreement_is_the_share_of_neighbours_of_the_same_kind():
    agreement = neighbour_agreement(torch.tensor([0, 2]), torch.tensor([[0, 1, 0, 0], [0, 1, 2, 1]]))
    torch.testing.assert_close(agreement, torch.tensor([0.75, 0.25]))


def test_the_probe_equals_least_squares_with_a_column_of_ones():
    embeddings, kinds = torch.randn(60, 4), torch.randint(0, 3, (60,))
    ours = fit_linear_probe(embeddings, kinds, 3, ridge=0.0)
    with_ones = torch.cat([embeddings, torch.ones(60, 1)], dim=1)
    theirs = torch.linalg.lstsq(with_ones, F.one_hot(kinds, 3).float()).solution
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_probe_does_not_depend_on_the_scale_of_embeddings():
    embeddings, kinds = torch.randn(40, 6), torch.randint(0, 3, (40,))
    answers = [linear_probe(s * embeddings, fit_linear_probe(s * embeddings, kinds, 3)) for s in (1e-3, 1.0, 1e3)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[2])


def test_the_probe_finds_kinds_that_lie_apart():
    centres = 5 * torch.eye(4)
    kinds = torch.arange(40) % 4
    embeddings = centres[kinds] + torch.randn(40, 4)
    assert (linear_probe(embeddings, fit_linear_probe(embeddings, kinds, 4)) == kinds).float().mean() > 0.9


def test_more_channels_than_maps_are_no_trouble():
    embeddings, kinds = torch.randn(5, 50), torch.tensor([0, 1, 0, 1, 1])
    assert torch.equal(linear_probe(embeddings, fit_linear_probe(embeddings, kinds, 2)), kinds)
