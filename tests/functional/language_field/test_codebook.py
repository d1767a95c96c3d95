import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.kmeans import kmeans
from lightning_modules.functional.language_field.codebook import codebook_usage, residual_assign, residual_kmeans


def decode(entries, codebook):
    return sum(codebook[layer][ids] for layer, ids in enumerate(entries.T))


def test_one_layer_is_k_means():
    features = F.normalize(torch.randn(80, 6), dim=1)
    codebook = residual_kmeans(features, num_layers=1, size=8, seed=4)
    assert torch.equal(codebook[0], kmeans(features, 8, seed=4).centroids)


def test_a_second_layer_is_k_means_of_the_residuals():
    features = torch.randn(80, 6)
    codebook = residual_kmeans(features, num_layers=2, size=8, seed=4)
    first = kmeans(features, 8, seed=4)
    residuals = features - first.centroids[first.assignments]
    assert torch.equal(codebook[1], kmeans(residuals, 8, seed=5).centroids)


def test_each_layer_lowers_the_error():
    features = torch.randn(100, 5)
    codebook = residual_kmeans(features, num_layers=4, size=6, seed=0)
    errors = [
        float((features - decode(residual_assign(features, codebook[: n + 1], metric="euclidean"), codebook)).norm())
        for n in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.6 * errors[0]


def test_as_many_entries_as_features_code_them_exactly():
    features = F.normalize(torch.randn(12, 5), dim=1)
    codebook = residual_kmeans(features, num_layers=1, size=12, seed=0)
    torch.testing.assert_close(decode(residual_assign(features, codebook), codebook), features)


def test_spherical_entries_have_unit_length_in_the_first_layer_alone():
    codebook = residual_kmeans(F.normalize(torch.randn(60, 5), dim=1), num_layers=2, size=6, seed=0, spherical=True)
    torch.testing.assert_close(codebook[0].norm(dim=1), torch.ones(6))
    assert (codebook[1].norm(dim=1) < 0.99).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 3), metric=st.sampled_from(["cosine", "euclidean"]))
def test_assignment_equals_the_literal_search(seed, layers, metric):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(15, 4, generator=generator, dtype=torch.float64)
    codebook = torch.randn(layers, 6, 4, generator=generator, dtype=torch.float64)
    residual, expected = features, []
    for layer, atoms in enumerate(codebook):
        if layer == 0 and metric == "cosine":
            ids = F.cosine_similarity(residual[:, None], atoms, dim=-1).argmax(1)
        else:
            ids = (residual[:, None] - atoms).norm(dim=-1).argmin(1)
        expected.append(ids)
        residual = residual - atoms[ids]
    assert torch.equal(residual_assign(features, codebook, metric=metric), torch.stack(expected, 1))


def test_cosine_assignment_ignores_the_length_of_an_entry_and_euclidean_does_not():
    codebook = torch.tensor([[[0.1, 0.0], [0.0, 0.9]]])
    feature = torch.tensor([[0.8, 0.6]])
    assert residual_assign(feature, codebook).item() == 0
    assert residual_assign(feature, codebook, metric="euclidean").item() == 1


@pytest.mark.parametrize(
    ("counts", "used", "perplexity"),
    [
        ([5, 5, 5, 5], 1.0, 4.0),
        ([7, 0, 0, 0], 0.25, 1.0),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([1, 1, 0, 2], 0.75, math.exp(0.5 * math.log(4) + 0.5 * math.log(2))),
    ],
)
def test_usage_of_known_counts(counts, used, perplexity):
    for dtype in (torch.int64, torch.float32):
        result = codebook_usage(torch.tensor(counts, dtype=dtype))
        assert [float(value) for value in result] == pytest.approx([used, perplexity])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        residual_kmeans(torch.randn(4, 2), num_layers=0, size=2, seed=0)
