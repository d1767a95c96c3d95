"""Tokens of a shape as one sequence for a language model, and back.

ShapeLLM-Omni quantizes a dense 16^3 grid, four neighbours along z at a time: 16 x 16 x 4 = 1024 ids, x slowest and z
fastest. Our latents are sparse: cells far from the surface have no code. Their place in the sequence holds one id more
than the codebook has, ``num_codes``; a language model needs that one word besides.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def token_sequence(
    coords: Int[Tensor, "tokens 3"], code_ids: Int[Tensor, " tokens"], grid: tuple[int, int, int], num_codes: int
) -> Int[Tensor, " places"]:
    """Returns the id of each place of a grid, z fastest; ``num_codes`` where there is no token.

    Args:
        coords: Places of the tokens, none twice. With four cells a token, z counts groups of four.
        code_ids: 0 to ``num_codes`` - 1.
        grid: Places along x, y and z: (16, 16, 4) is a sequence of 1024.
        num_codes: K.

    Raises:
        ValueError: If a place is outside the grid, one is taken twice, or an id is out of range.
    """
    places = _places(coords, grid)
    if len(places) != len(places.unique()):
        raise ValueError("Two tokens are at the same place; a shape has one token a place.")
    if len(code_ids) and not 0 <= int(code_ids.min()) <= int(code_ids.max()) < num_codes:
        raise ValueError(
            f"Token ids are from {int(code_ids.min())} to {int(code_ids.max())}; allowed: 0 to {num_codes - 1}."
        )
    sequence = code_ids.new_full((grid[0] * grid[1] * grid[2],), num_codes)
    sequence[places] = code_ids
    return sequence


def tokens_of_sequence(
    sequence: Int[Tensor, " places"], grid: tuple[int, int, int], num_codes: int
) -> tuple[Int[Tensor, "tokens 3"], Int[Tensor, " tokens"]]:
    """Returns places and ids of the tokens in a sequence, in its order: the inverse of ``token_sequence``.

    Raises:
        ValueError: If the sequence has another length than the grid, or ids that are neither codes nor ``num_codes``.
    """
    length = grid[0] * grid[1] * grid[2]
    if len(sequence) != length:
        raise ValueError(
            f"The sequence has {len(sequence)} ids, a grid of {grid} needs {length}. Shorter answers of a language "
            "model are to be filled up with num_codes, the id of an empty place."
        )
    if len(sequence) and not 0 <= int(sequence.min()) <= int(sequence.max()) <= num_codes:
        raise ValueError(
            f"The sequence has ids from {int(sequence.min())} to {int(sequence.max())}; allowed: 0 to {num_codes - 1}, "
            f"and {num_codes} for an empty place."
        )
    places = (sequence < num_codes).nonzero()[:, 0]
    coords = torch.stack([places // (grid[1] * grid[2]), places // grid[2] % grid[1], places % grid[2]], dim=1)
    return coords, sequence[places]


def _places(coords: Tensor, grid: tuple[int, int, int]) -> Tensor:
    limits = torch.tensor(grid, device=coords.device)
    if bool(((coords < 0) | (coords >= limits)).any()):
        raise ValueError(f"Token coordinates reach {coords.amax(0).tolist()}; the grid has {grid} places.")
    x, y, z = coords.long().unbind(1)
    return (x * grid[1] + y) * grid[2] + z
