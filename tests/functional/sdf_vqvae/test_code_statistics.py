import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.sdf_vqvae.code_statistics import code_counts, code_statistics, entropy, usage


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 9), st.integers(0, 2**31))
def test_statistics_are_those_of_a_one_hot_matrix_in_double_precision(num_latents, num_codes, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(num_latents, channels, generator=generator)
    ids = torch.randint(num_codes, (num_latents,), generator=generator)
    members = F.one_hot(ids, num_codes).double()
    found = code_statistics(latents, ids, num_codes)
    assert torch.equal(found.counts.double(), members.sum(0))
    torch.testing.assert_close(found.sums.double(), members.T @ latents.double(), rtol=1e-5, atol=1e-5)


def test_sorted_segments_as_on_cuda_give_the_same_sums():
    latents, ids = torch.randn(500, 6), torch.randint(40, (500,))
    counts = torch.bincount(ids, minlength=40)
    by_code = latents[ids.sort(stable=True).indices]
    segments = torch.segment_reduce(by_code, "sum", lengths=counts, axis=0, initial=0)
    torch.testing.assert_close(segments, code_statistics(latents, ids, 40).sums)


def test_usage_and_entropy_of_even_and_of_single_tokens():
    counts = code_counts(torch.tensor([0, 1, 2, 3] * 5), 8)
    assert usage(counts) == 0.5
    assert entropy(counts).exp() == pytest.approx(4)
    assert entropy(code_counts(torch.full((7,), 3), 8)) == 0
    assert entropy(code_counts(torch.zeros(0, dtype=torch.int64), 8)) == 0


def test_entropy_of_shares():
    assert entropy(torch.tensor([3, 1])) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
