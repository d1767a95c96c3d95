import torch

from callbacks.writers.language_field import langsplat_logits
from lightning_modules.functional.answers.language_scene import level_codes
from lightning_modules.functional.language_field.sparse_codes import SparseCodes, densify_codes


def langsplat_soft_code(logits: torch.Tensor, k: int) -> torch.Tensor:
    """LangSplatV2's way from logits to weights, from its paper's description: softmax, top-k, renormalise."""
    probabilities = logits.softmax(1)
    kept, ids = probabilities.topk(k, dim=1)
    weights = torch.zeros_like(probabilities).scatter_(1, ids, kept)
    return weights / (weights.sum(1, keepdim=True) + 1e-10)


def codes(num_gaussians: int = 40, size: int = 12, top_k: int = 4) -> SparseCodes:
    ids = torch.stack([torch.randperm(size)[:top_k] for _ in range(num_gaussians)]).to(torch.int16)
    values = torch.rand(num_gaussians, top_k)
    values[3, 1:] = 0  # a Gaussian of one entry
    return SparseCodes(ids, values / values.sum(1, keepdim=True), size)


def test_langsplat_reads_back_the_codes():
    given = codes()
    logits, _ = langsplat_logits(given, torch.randn(12, 5))
    read = langsplat_soft_code(logits, 4)
    torch.testing.assert_close(read, densify_codes(given), atol=4e-6, rtol=1e-5)
    assert ((read > 0).sum(1) == 4).all()  # its quick path views the nonzero weights as [N, k]


def test_a_gaussian_without_language_decodes_to_zero_in_langsplat():
    given = codes()
    given.values[7] = 0
    given.values[given.channel_ids == 5] = 0  # an entry nobody uses
    given = given._replace(values=given.values / given.values.sum(1, keepdim=True).clamp_min(1e-9))
    entries = torch.randn(12, 5)
    logits, codebook = langsplat_logits(given, entries)
    decoded = langsplat_soft_code(logits, 4) @ codebook
    torch.testing.assert_close(decoded, densify_codes(given) @ entries, atol=1e-4, rtol=1e-4)
    assert decoded[7].norm() < 1e-4


def test_levels_are_numbered_from_zero_again():
    both = SparseCodes(torch.tensor([[0, 3, 12, 14]], dtype=torch.int16), torch.ones(1, 4), 24)
    second = level_codes(both, 1, 2)
    assert second.channel_ids.tolist() == [[0, 2]]
    assert second.num_channels == 12
