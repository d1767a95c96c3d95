import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.sdf_vqvae.token_sequences import token_sequence, tokens_of_sequence


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(16, 16, 4), (3, 2, 5), (16, 16, 16)]), st.floats(0, 1), st.integers(0, 2**31))
def test_a_sequence_gives_back_its_tokens(grid, filled, seed):
    generator = torch.Generator().manual_seed(seed)
    occupied = torch.rand(grid, generator=generator) < filled
    coords = occupied.nonzero()
    ids = torch.randint(8192, (len(coords),), generator=generator)
    sequence = token_sequence(coords, ids, grid, 8192)
    assert len(sequence) == grid[0] * grid[1] * grid[2]
    again, same_ids = tokens_of_sequence(sequence, grid, 8192)
    assert torch.equal(again, coords)
    assert torch.equal(same_ids, ids)


def test_a_grid_of_16_is_1024_tokens_in_the_order_of_shapellm_omni():
    """Its dense latents [C, 16, 16, 16] become rows of four z-neighbours by this permutation and view."""
    cells = torch.arange(16**3).view(1, 16, 16, 16)
    rows = cells.permute(1, 2, 3, 0).reshape(1024, 4)
    coords = (torch.ones(16, 16, 4) > 0).nonzero()
    ids = cells[0, coords[:, 0], coords[:, 1], 4 * coords[:, 2]] // 4
    assert torch.equal(token_sequence(coords, ids, (16, 16, 4), 8192), rows[:, 0] // 4)


def test_empty_places_hold_the_id_after_the_last_code():
    sequence = token_sequence(torch.tensor([[0, 1, 0]]), torch.tensor([7]), (1, 2, 2), 10)
    assert sequence.tolist() == [10, 10, 7, 10]


@pytest.mark.parametrize(
    ("coords", "ids", "message"),
    [
        ([[0, 0, 4]], [1], "the grid has"),
        ([[0, 0, 1], [0, 0, 1]], [1, 2], "same place"),
        ([[0, 0, 1]], [10], "0 to 9"),
    ],
)
def test_impossible_tokens_are_refused(coords, ids, message):
    with pytest.raises(ValueError, match=message):
        token_sequence(torch.tensor(coords), torch.tensor(ids), (2, 2, 4), 10)


def test_impossible_sequences_are_refused():
    with pytest.raises(ValueError, match="has 3 ids"):
        tokens_of_sequence(torch.zeros(3, dtype=torch.int64), (2, 2, 1), 10)
    with pytest.raises(ValueError, match="10 for an empty place"):
        tokens_of_sequence(torch.tensor([0, 1, 2, 11]), (2, 2, 1), 10)
