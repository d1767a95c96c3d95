from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.language_field.lifting import MaskWeights
from lightning_modules.functional.language_field.sparse_coding import (
    code_by_histogram,
    code_by_simplex_pursuit,
    simplex_pursuit,
)

CODERS = ["histogram", "simplex_pursuit"]


def sparse(matrix: torch.Tensor) -> MaskWeights:
    gaussian_ids, mask_ids = matrix.nonzero().int().unbind(1)
    return MaskWeights(gaussian_ids, mask_ids, matrix[matrix != 0], *matrix.shape)


def random_matrix(seed: int, num_gaussians: int = 25, num_masks: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(num_gaussians, num_masks, generator=generator, dtype=torch.float64)
    matrix = matrix * (torch.rand(num_gaussians, num_masks, generator=generator) < 0.5)
    matrix[3] = 0.0  # a Gaussian that paints no mask
    return matrix


def random_codebook(seed: int, layers: int = 2, size: int = 6, channels: int = 5) -> torch.Tensor:
    return torch.randn(layers, size, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def code(coder: str, seed: int, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    matrix, codebook = random_matrix(seed), random_codebook(seed)
    if coder == "histogram":
        mask_entries = torch.randint(0, 6, (10, 2), generator=torch.Generator().manual_seed(seed))
        return code_by_histogram(sparse(matrix), mask_entries, 6, top_k)
    features = F.normalize(
        torch.randn(10, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )
    return code_by_simplex_pursuit(sparse(matrix), features, codebook, top_k)


@pytest.mark.parametrize("seed", range(3))
def test_histogram_equals_a_loop_over_masks(seed):
    matrix = random_matrix(seed)
    mask_entries = torch.randint(0, 6, (10, 2), generator=torch.Generator().manual_seed(seed))
    entries, values = code_by_histogram(sparse(matrix), mask_entries, 6, 3)
    for gaussian in range(25):
        for layer in range(2):
            histogram = [0.0] * 6
            for mask in range(10):
                histogram[int(mask_entries[mask, layer])] += float(matrix[gaussian, mask])
            kept = sorted(range(6), key=lambda entry: (-histogram[entry], entry))[:3]
            assert entries[gaussian, layer].tolist() == kept
            total = sum(histogram[entry] for entry in kept)
            expected = [histogram[entry] / total if total else 0.0 for entry in kept]
            torch.testing.assert_close(values[gaussian, layer], torch.tensor(expected, dtype=torch.float64))


def test_a_histogram_of_all_entries_decodes_to_the_mean_of_the_masks_atoms():
    matrix, codebook = random_matrix(1), random_codebook(1, layers=1)
    mask_entries = torch.randint(0, 6, (10, 1))
    entries, values = code_by_histogram(sparse(matrix), mask_entries, 6, 6)
    decoded = torch.einsum("gk,gkc->gc", values[:, 0], codebook[0][entries[:, 0]])
    mean = matrix @ codebook[0][mask_entries[:, 0]] / matrix.sum(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(decoded, mean)


@pytest.mark.parametrize("coder", CODERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 6))
def test_coefficients_are_distinct_not_negative_and_sum_to_one_or_are_zero(coder, seed, top_k):
    entries, values = code(coder, seed, top_k)
    assert (values >= 0).all()
    assert entries.min() >= 0
    assert entries.max() < 6
    seen = (random_matrix(seed) > 0).any(dim=1).double()
    torch.testing.assert_close(values.sum(dim=-1), seen[:, None].expand(-1, 2))
    assert all(len(set(row)) == top_k for row in entries.flatten(0, 1).tolist())


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("top_k", [0, 7])
def test_top_k_outside_of_the_codebook_is_refused(coder, top_k):
    with pytest.raises(ValueError, match=f"between 1 and 6 .* got {top_k}"):
        code(coder, 0, top_k)


def test_coding_commutes_with_renumbering_gaussians_and_masks():
    matrix = random_matrix(2)
    features = F.normalize(torch.randn(10, 5, dtype=torch.float64), dim=-1)
    mask_entries = torch.randint(0, 6, (10, 2))
    gaussians, masks = torch.randperm(25), torch.randperm(10)
    for ours, theirs in (
        (code_by_histogram(sparse(matrix), mask_entries, 6, 3),
         code_by_histogram(sparse(matrix[gaussians][:, masks]), mask_entries[masks], 6, 3)),
        (code_by_simplex_pursuit(sparse(matrix), features, random_codebook(2), 3),
         code_by_simplex_pursuit(sparse(matrix[gaussians][:, masks]), features[masks], random_codebook(2), 3)),
    ):  # fmt: skip
        torch.testing.assert_close(theirs[1], ours[1][gaussians])
        used = ours[1][gaussians] > 0
        assert torch.equal(theirs[0][used], ours[0][gaussians][used])


def best_mixture(point: torch.Tensor, atoms: torch.Tensor) -> float:
    """Smallest squared distance from a point to the convex hull of some atoms, by trying every face."""
    best = float("inf")
    for count in range(1, len(atoms) + 1):
        for face in combinations(range(len(atoms)), count):
            corners = atoms[list(face)]
            system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
            system[:count, :count] = corners @ corners.T
            system[:count, count] = system[count, :count] = 1
            weights = torch.linalg.solve(system, torch.cat([corners @ point, torch.ones(1, dtype=torch.float64)]))[
                :count
            ]
            if (weights >= -1e-12).all():
                best = min(best, float((weights @ corners - point).square().sum()))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_pursuit_is_the_best_mixture_of_the_atoms_it_uses(seed):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    points = 0.5 * torch.randn(12, 5, generator=generator, dtype=torch.float64)
    support, weights = simplex_pursuit(points @ atoms.T, atoms @ atoms.T, 4)
    for point, chosen, mixture in zip(points, support, weights, strict=True):
        distance = float((mixture @ atoms[chosen] - point).square().sum())
        used = chosen[mixture > 0]
        assert distance == pytest.approx(best_mixture(point, atoms[used]), abs=1e-9)


def test_pursuit_comes_closer_with_every_atom_and_is_exact_on_a_mixture_of_two():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    points = 0.3 * torch.randn(50, 12, generator=generator, dtype=torch.float64)
    distances = []
    for top_k in range(1, 6):
        support, weights = simplex_pursuit(points @ atoms.T, atoms @ atoms.T, top_k)
        distances.append((torch.einsum("pk,pkc->pc", weights, atoms[support]) - points).square().sum(dim=-1))
    assert all((after <= before + 1e-9).all() for before, after in pairwise(distances))
    assert (distances[3] < 0.9 * distances[0]).float().mean() > 0.5

    blend = 0.7 * atoms[2:3] + 0.3 * atoms[9:10]
    support, weights = simplex_pursuit(blend @ atoms.T, atoms @ atoms.T, 2)
    assert dict(zip(support[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx({2: 0.7, 9: 0.3}, abs=1e-6)


def test_pursuit_survives_atoms_that_coincide():
    atoms = torch.randn(1, 4).expand(5, 4).clone()
    _, weights = simplex_pursuit(torch.randn(6, 4) @ atoms.T, atoms @ atoms.T, 4)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(6))
    assert (weights >= 0).all()


def test_pursuit_of_a_second_layer_codes_what_the_first_leaves():
    matrix, codebook = random_matrix(5), random_codebook(5)
    features = F.normalize(torch.randn(10, 5, dtype=torch.float64), dim=-1)
    entries, values = code_by_simplex_pursuit(sparse(matrix), features, codebook, 3)
    seen = (matrix > 0).any(dim=1)
    means = (matrix @ features / matrix.sum(dim=1, keepdim=True).clamp(min=1e-12))[seen]
    first = torch.einsum("gk,gkc->gc", values[seen, 0], codebook[0][entries[seen, 0]])
    support, weights = simplex_pursuit((means - first) @ codebook[1].T, codebook[1] @ codebook[1].T, 3)
    torch.testing.assert_close(values[seen, 1], weights)
    assert torch.equal(entries[seen, 1], support)


def test_no_gaussians_give_no_codes():
    nothing = sparse(torch.zeros(0, 3))
    entries, values = code_by_histogram(nothing, torch.zeros(3, 1, dtype=torch.int64), 6, 2)
    assert entries.shape == values.shape == (0, 1, 2)
    entries, values = code_by_simplex_pursuit(nothing, torch.zeros(3, 5), torch.zeros(1, 6, 5), 2)
    assert entries.shape == values.shape == (0, 1, 2)
