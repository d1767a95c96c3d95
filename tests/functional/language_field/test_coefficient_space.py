import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.functional.answers.relevancy import relevancy as dense_relevancy
from lightning_modules.functional.language_field import coefficient_space
from lightning_modules.functional.language_field.coefficient_space import (
    cosine_similarity_to_targets,
    decoded_norms,
    gram_matrix,
    normalized_coefficients,
    relevancy,
    similarity,
)

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}


def field(pixels=40, entries=6, channels=9, masks=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(pixels, entries, generator=generator, dtype=torch.float64)
    codebook = torch.randn(entries, channels, generator=generator, dtype=torch.float64)
    targets = torch.randn(masks, channels, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, masks, (pixels,), generator=generator)
    return weights.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_(), targets.to(dtype), ids


def dense_loss(weights, codebook, targets, ids):
    """LangSplatV2's cosine loss on [C, P] maps; what it adds for unlabelled pixels is constant."""
    labelled = (ids >= 0).to(weights)
    decoded, truth = codebook.T @ weights.T, targets[ids].T
    return 1 - F.cosine_similarity(decoded * labelled, truth * labelled, dim=0).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, DOUBLE), (torch.float32, SINGLE)])
@pytest.mark.parametrize("block_bytes", [1, 400, 2**21])
def test_cosine_loss_equals_langsplats_dense_form_in_value_and_gradient(dtype, tolerance, block_bytes, monkeypatch):
    monkeypatch.setattr(coefficient_space, "CPU_BLOCK_BYTES", block_bytes)
    weights, codebook, targets, ids = field(dtype=dtype)
    ours = 1 - cosine_similarity_to_targets(weights, codebook, targets, ids).mean()
    dense = dense_loss(weights, codebook, targets, ids)
    torch.testing.assert_close(ours, dense, **tolerance)
    for mine, reference in zip(
        torch.autograd.grad(ours, (weights, codebook)), torch.autograd.grad(dense, (weights, codebook)), strict=True
    ):
        torch.testing.assert_close(mine, reference, **tolerance)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pixels=st.integers(0, 12),
    entries=st.integers(1, 12),
    channels=st.integers(1, 8),
    masks=st.integers(0, 4),
)
def test_any_sizes_equal_the_dense_cosine(seed, pixels, entries, channels, masks):
    weights, codebook, targets, _ = field(pixels, entries, channels, max(masks, 1), seed=seed)
    targets = targets[:masks]
    ids = torch.randint(-1, max(masks, 0), (pixels,)) if masks else torch.full((pixels,), -1)
    ours = cosine_similarity_to_targets(weights, codebook, targets, ids)
    decoded = weights @ codebook
    dense = torch.stack(
        [F.cosine_similarity(decoded[p], targets[m], dim=0) if m >= 0 else decoded.sum() * 0 for p, m in enumerate(ids)]
        or [torch.zeros(0, dtype=torch.float64)]
    ).reshape(-1)
    torch.testing.assert_close(ours, dense, **DOUBLE)


def test_gradients_by_finite_differences():
    weights, codebook, targets, ids = field(pixels=6)
    assert torch.autograd.gradcheck(lambda w, s: cosine_similarity_to_targets(w, s, targets, ids), (weights, codebook))
    texts = targets[:2]
    for function in (
        lambda w, s: decoded_norms(w, gram_matrix(s)),
        lambda w, s: normalized_coefficients(w, gram_matrix(s)),
        lambda w, s: similarity(w, s, texts),
        lambda w, s: relevancy(w, s, texts, targets[2:]),
    ):
        assert torch.autograd.gradcheck(function, (weights, codebook))


@pytest.mark.parametrize("needed", ["weights", "codebook"])
def test_a_gradient_that_nobody_asked_for_is_not_made(needed):
    weights, codebook, targets, ids = field()
    both = torch.autograd.grad(cosine_similarity_to_targets(weights, codebook, targets, ids).sum(), (weights, codebook))
    (weights if needed == "codebook" else codebook).requires_grad_(False)
    cosine_similarity_to_targets(weights, codebook, targets, ids).sum().backward()
    assert (weights.grad is None) == (needed == "codebook")
    assert (codebook.grad is None) == (needed == "weights")
    torch.testing.assert_close(weights.grad if needed == "weights" else codebook.grad, both[needed == "codebook"])


def test_one_level_of_a_wider_map_equals_its_copy():
    weights, codebook, targets, ids = field(entries=18)
    atoms = codebook[6:12]
    ours = torch.autograd.grad(cosine_similarity_to_targets(weights[:, 6:12], atoms, targets, ids).sum(), weights)[0]
    copy = weights[:, 6:12].detach().clone().requires_grad_()
    expected = torch.autograd.grad(cosine_similarity_to_targets(copy, atoms, targets, ids).sum(), copy)[0]
    torch.testing.assert_close(ours[:, 6:12], expected)
    assert not ours[:, :6].any()
    assert not ours[:, 12:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_without_a_direction_have_cosine_zero_and_no_gradient(dtype):
    weights, codebook, targets, _ = field(pixels=5, dtype=dtype)
    with torch.no_grad():
        codebook[1] = codebook[0]
        weights[0] = 0  # nothing there
        weights[1] = 1e-9  # next to nothing
        weights[2] = 0
        weights[2, :2] = torch.tensor([0.7, -0.7])  # cancels
    targets[3] = 0
    cosine = cosine_similarity_to_targets(weights, codebook, targets, torch.tensor([0, 1, 2, 3, -1]))
    assert not cosine.any()
    for grad in torch.autograd.grad(cosine, (weights, codebook), torch.full_like(cosine, 1e6)):
        assert not grad.any()


def test_cancelling_coefficients_that_leave_a_direction_keep_it():
    weights = torch.tensor([[0.5, -0.49]], dtype=torch.float64)
    codebook = torch.tensor([[1.0, 0.0], [1.0, 0.1]], dtype=torch.float64)
    cosine = cosine_similarity_to_targets(weights, codebook, weights @ codebook, torch.tensor([0]))
    torch.testing.assert_close(cosine, torch.ones(1, dtype=torch.float64))


def test_nothing_of_the_size_of_pixels_times_channels_is_made():
    weights, codebook, targets, ids = field(pixels=1000, entries=4, channels=64, dtype=torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    with Watch():
        cosine_similarity_to_targets(weights, codebook, targets, ids).sum().backward()
        relevancy(weights.detach(), codebook.detach(), targets[:2], targets[2:])
    assert largest == 5000  # pixels x prompts; the weight map has 4000 and decoded features would have 64000


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, DOUBLE), (torch.float32, SINGLE)])
@pytest.mark.parametrize("block_bytes", [400, 2**21])
def test_norms_similarity_and_relevancy_equal_the_dense_path(dtype, tolerance, block_bytes, monkeypatch):
    monkeypatch.setattr(coefficient_space, "CPU_BLOCK_BYTES", block_bytes)
    weights, codebook, texts, _ = field(dtype=dtype)
    with torch.no_grad():
        weights[3] = 0
    decoded = weights @ codebook
    norms = decoded_norms(weights, gram_matrix(codebook))
    torch.testing.assert_close(norms, decoded.norm(dim=1), **tolerance)
    unit = F.normalize(decoded, dim=1)
    torch.testing.assert_close(normalized_coefficients(weights, gram_matrix(codebook)) @ codebook, unit, **tolerance)
    for cached in (None, norms):
        ours = similarity(weights, codebook, texts, norms=cached)
        torch.testing.assert_close(ours, unit @ F.normalize(texts, dim=1).T, **tolerance)
        for temperature in (10.0, 3.0):
            ours = relevancy(weights, codebook, texts[:2], texts[2:], temperature=temperature, norms=cached)
            dense = dense_relevancy(decoded, texts[:2], texts[2:], temperature=temperature)
            torch.testing.assert_close(ours, dense, **tolerance)
            assert ours[3].tolist() == [0.5, 0.5]


def test_relevancy_of_no_prompts_is_empty():
    weights, codebook, texts, _ = field()
    assert relevancy(weights, codebook, texts[:0], texts).shape == (40, 0)


def test_relevancy_without_negatives_is_refused():
    weights, codebook, texts, _ = field()
    with pytest.raises(ValueError, match="at least one negative"):
        relevancy(weights, codebook, texts, texts[:0])


def test_half_precision_maps_are_computed_in_single():
    weights, codebook, targets, ids = field(dtype=torch.float16)
    ours = cosine_similarity_to_targets(weights, codebook, targets, ids)
    double = cosine_similarity_to_targets(weights.double(), codebook.double(), targets.double(), ids)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), double, **SINGLE)
    grads = torch.autograd.grad(ours.sum(), (weights, codebook))
    assert all(grad.dtype == torch.float16 and grad.any() for grad in grads)


def test_autocast_does_not_lower_the_precision():
    weights, codebook, targets, ids = field(dtype=torch.float32)
    expected = cosine_similarity_to_targets(weights, codebook, targets, ids)
    answer = relevancy(weights, codebook, targets[:1], targets[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cosine_similarity_to_targets(weights, codebook, targets, ids), expected)
        torch.testing.assert_close(relevancy(weights, codebook, targets[:1], targets[1:]), answer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_same_cosines_gradients_and_relevancy():
    weights, codebook, targets, ids = field(pixels=5000, entries=64, channels=128, dtype=torch.float32)
    answers = []
    for device in ("cpu", "cuda"):
        leaves = [leaf.detach().to(device).requires_grad_() for leaf in (weights, codebook)]
        on_device = targets.to(device)
        cosine = cosine_similarity_to_targets(*leaves, on_device, ids.to(device))
        gradients = torch.autograd.grad(cosine.sum(), leaves)
        relevancies = relevancy(*leaves, on_device[:2], on_device[2:])
        answers.append([tensor.cpu() for tensor in (cosine, *gradients, relevancies)])
    for ours, reference in zip(*answers, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5 * float(reference.abs().max()))
