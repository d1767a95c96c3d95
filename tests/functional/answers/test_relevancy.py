import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.answers.relevancy import relevancy


def literal(features, positives, negatives, temperature=10.0):
    """LERF's form: for each prompt a softmax with each negative, then the smallest."""
    features = features / (features.norm(dim=1, keepdim=True) + 1e-10)
    result = []
    for positive in positives:
        pairs = torch.stack(
            [torch.stack([features @ positive, features @ negative], dim=1) for negative in negatives], dim=1
        )
        result.append((temperature * pairs).softmax(dim=-1)[..., 0].amin(dim=1))
    return torch.stack(result, dim=1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), prompts=st.integers(0, 3), negatives=st.integers(1, 5), temperature=st.floats(1, 30))
def test_equals_the_smallest_pairwise_softmax(seed, prompts, negatives, temperature):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    positive = F.normalize(torch.randn(prompts, 6, generator=generator, dtype=torch.float64), dim=1)
    negative = F.normalize(torch.randn(negatives, 6, generator=generator, dtype=torch.float64), dim=1)
    ours = relevancy(features, positive, negative, temperature=temperature)
    assert ours.shape == (9, prompts)
    if prompts:
        torch.testing.assert_close(ours, literal(features, positive, negative, temperature))


def test_lengths_do_not_matter():
    features, positives, negatives = torch.randn(5, 4), torch.randn(2, 4), torch.randn(3, 4)
    torch.testing.assert_close(
        relevancy(features, positives, negatives), relevancy(9 * features, 2 * positives, 0.1 * negatives)
    )


def test_a_feature_of_zero_scores_a_half():
    assert relevancy(torch.zeros(1, 4), torch.randn(2, 4), torch.randn(4, 4)).tolist() == [[0.5, 0.5]]


def test_a_prompt_that_is_a_negative_never_beats_it():
    negatives = torch.randn(4, 6)
    assert (relevancy(torch.randn(50, 6), negatives[:1], negatives) <= 0.5 + 1e-6).all()


def test_no_negative_is_refused():
    with pytest.raises(ValueError, match="object, things, stuff, texture"):
        relevancy(torch.randn(2, 4), torch.randn(1, 4), torch.zeros(0, 4))
