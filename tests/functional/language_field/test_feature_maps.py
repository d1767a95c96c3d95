import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.functional.language_field.feature_maps import (
    compute_feature_map_quick,
    compute_final_feature_map,
    compute_layer_feature_map,
)

LAYERS, SIZE, CHANNELS, HEIGHT, WIDTH = 3, 4, 7, 5, 6


def inputs(dtype=torch.float64, layers=LAYERS):
    weights = torch.rand(layers * SIZE, HEIGHT, WIDTH, dtype=torch.float64)
    weights[:, 0, 0] = 0  # a pixel that nothing covers
    codebook = torch.randn(layers, SIZE, CHANNELS, dtype=torch.float64)
    return weights.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()


def literal(weights, codebook):
    """LangSplatV2's form: each layer's map by itself, [layers, C, H, W]."""
    parts = weights.reshape(*codebook.shape[:2], *weights.shape[-2:])
    return torch.einsum("lsc,lshw->lchw", codebook, parts)


def assert_equal_with_gradients(ours, theirs, leaves, **tolerance):
    torch.testing.assert_close(ours, theirs, **tolerance)
    direction = torch.randn_like(theirs)
    direction[..., 0, 0] = 0  # there a normalised zero differs by design; see its own test
    for mine, reference in zip(
        torch.autograd.grad(ours, leaves, direction, allow_unused=True, retain_graph=True),
        torch.autograd.grad(theirs, leaves, direction, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, **tolerance)


@pytest.mark.parametrize("max_bytes", [1, 2000, 2**26])
@pytest.mark.parametrize("normalize", [False, True])
def test_final_map_equals_the_sum_of_the_layers(normalize, max_bytes):
    weights, codebook = inputs()
    expected = literal(weights, codebook).sum(0)
    expected = F.normalize(expected, dim=0) if normalize else expected
    ours = compute_final_feature_map(weights, codebook, normalize, max_bytes=max_bytes)
    assert_equal_with_gradients(ours, expected, (weights, codebook))


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("normalize", [False, True])
def test_layer_map_sums_up_to_the_layer_with_the_lower_ones_detached(layer, normalize):
    weights, codebook = inputs()
    maps = literal(weights, codebook)
    expected = maps[layer] + maps[:layer].sum(0).detach()
    expected = F.normalize(expected, dim=0) if normalize else expected
    ours = compute_layer_feature_map(weights, codebook, layer, normalize)
    assert_equal_with_gradients(ours, expected, (weights, codebook))
    grad_weights, grad_codebook = torch.autograd.grad(ours.sum(), (weights, codebook))
    own = torch.zeros(LAYERS, dtype=torch.bool)
    own[layer] = True
    assert torch.equal(grad_codebook.flatten(1).any(1), own)
    assert torch.equal(grad_weights.reshape(LAYERS, -1).any(1), own)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_quick_map_keeps_the_layers_apart(layers, normalize):
    weights, codebook = inputs(layers=layers)
    expected = literal(weights, codebook)
    expected = F.normalize(expected, dim=1) if normalize else expected
    ours = compute_feature_map_quick(weights.reshape(layers, SIZE, HEIGHT, WIDTH), codebook, normalize)
    assert ours.shape == ((CHANNELS, HEIGHT, WIDTH) if layers == 1 else (layers, CHANNELS, HEIGHT, WIDTH))
    assert_equal_with_gradients(ours, expected[0] if layers == 1 else expected, (weights, codebook))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("normalize", [False, True])
def test_lower_precisions_round_the_double_result(dtype, tolerance, normalize):
    weights, codebook = inputs(dtype)
    double = literal(weights.double(), codebook.double()).sum(0)
    double = F.normalize(double, dim=0) if normalize else double
    ours = compute_final_feature_map(weights, codebook, normalize)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), double, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(double)
    direction[:, 0, 0] = 0
    theirs = torch.autograd.grad(double, (weights, codebook), direction)
    for mine, reference in zip(
        torch.autograd.grad(ours, (weights, codebook), direction.to(dtype)), theirs, strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, reference, rtol=10 * tolerance, atol=10 * tolerance)


def test_half_precision_accumulates_in_single():
    # 4096 terms of 1/64 add up to 64; a running sum in half precision would stop growing far below.
    weights, codebook = torch.full((4096, 1, 1), 1 / 64).half(), torch.ones(1, 4096, 2).half()
    assert compute_final_feature_map(weights, codebook).flatten().tolist() == [64.0, 64.0]


def test_a_zero_feature_stays_zero_under_normalisation_and_gets_no_gradient():
    weights, codebook = inputs()
    decoded = compute_final_feature_map(weights, codebook, normalize=True)
    assert not decoded[:, 0, 0].any()
    torch.testing.assert_close(decoded.norm(dim=0).flatten()[1:], torch.ones(HEIGHT * WIDTH - 1, dtype=torch.float64))
    (grad,) = torch.autograd.grad(decoded.sum(), weights)
    assert not grad[:, 0, 0].any()


def test_gradients_by_finite_differences():
    weights, codebook = (leaf.detach() for leaf in inputs())
    leaves = weights[:, 1:2, :3].clone().requires_grad_(), codebook[..., :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, c: compute_final_feature_map(w, c, True, max_bytes=500), leaves)


def test_pixels_are_decoded_in_blocks_that_fit_the_memory():
    weights, codebook, map_bytes = torch.rand(8, 64, 1024), torch.randn(1, 8, 64), 64 * 64 * 1024 * 4
    sizes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[:2] == (1, 64):  # decoded features
                sizes.add(result.numel() * result.element_size())
            return result

    with Watch(), torch.no_grad():
        compute_final_feature_map(weights, codebook, normalize=True, max_bytes=2**20)
    assert map_bytes in sizes
    assert 2**17 < max(sizes - {map_bytes}) <= 2**19  # two blocks are alive at once


@pytest.mark.parametrize(
    ("weights", "codebook", "message"),
    [
        (torch.rand(12, 5), torch.rand(3, 4, 7), r"weight_map must have the axes \[layers \* size, H, W\]"),
        (torch.rand(12, 5, 6), torch.rand(12, 7), r"codebook must have the axes \[layers, size, C\]"),
        (torch.rand(11, 5, 6), torch.rand(3, 4, 7), "11 channels but the codebook has 3 layers x 4 entries = 12"),
        (torch.rand(12, 5, 6).half(), torch.rand(3, 4, 7), "float16 but the codebook is torch.float32"),
        (torch.ones(12, 5, 6).long(), torch.rand(3, 4, 7), "floating-point"),
        (torch.rand(12, 5, 6, device="meta"), torch.rand(3, 4, 7), "on meta but the codebook is on cpu"),
    ],
)
def test_shapes_that_do_not_fit_are_named(weights, codebook, message):
    with pytest.raises(ValueError, match=message):
        compute_final_feature_map(weights, codebook)
    with pytest.raises(ValueError, match=message):
        compute_layer_feature_map(weights, codebook, 0)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(ValueError, match=f"between 0 and 2 .* got {layer}"):
        compute_layer_feature_map(torch.rand(12, 5, 6), torch.rand(3, 4, 7), layer)


@pytest.mark.parametrize("shape", [(12, 5, 6), (3, 5, 5, 6), (2, 4, 5, 6)])
def test_quick_shapes_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match="weight_map"):
        compute_feature_map_quick(torch.rand(shape), torch.rand(3, 4, 7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 4e-3)])
def test_the_gpu_gives_the_same_map(dtype, tolerance):
    weights, codebook = (leaf.detach() for leaf in inputs(dtype))
    expected = compute_final_feature_map(weights, codebook, normalize=True)
    ours = compute_final_feature_map(weights.cuda(), codebook.cuda(), normalize=True).cpu()
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
