from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity as skimage_similarity
from torch import Tensor

from lightning_modules.functional.splatting.structural_similarity import structural_similarity


def twin(a: Tensor, b: Tensor) -> Tensor:
    """The definition by two-dimensional convolution, [images, height, width, channels], in the images' dtype."""
    a, b = a.movedim(-1, 1), b.movedim(-1, 1)
    offsets = torch.arange(-5, 6, dtype=a.dtype)
    window = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(a.shape[1], 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, padding=5, groups=x.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (luminance * (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)).mean()


def images(*shape: int) -> tuple[Tensor, Tensor]:
    """Two related images with smooth and rough parts."""
    a = F.avg_pool2d(torch.rand(shape[0], shape[3], shape[1] + 4, shape[2] + 4), 5, stride=1).movedim(1, -1)
    return a + 0.05 * torch.randn(shape), (0.8 * a + 0.1 + 0.1 * torch.randn(shape)).clamp(0, 1)


SHAPES = [(1, 40, 57, 3), (2, 23, 16, 3), (1, 5, 90, 1), (3, 70, 4, 2), (1, 1, 1, 3), (1, 11, 11, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_equal_the_twin(shape: tuple[int, ...]) -> None:
    a, b = (image.requires_grad_() for image in images(*shape))
    wide = [image.detach().double().requires_grad_() for image in (a, b)]
    similarity, expected = structural_similarity(a, b), twin(*wide)
    assert similarity.item() == pytest.approx(expected.item(), abs=2e-6)
    gradients = torch.autograd.grad(3 * similarity, [a, b])
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, wide), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs.float(), atol=2e-5 * float(theirs.abs().max()), rtol=2e-4)


def test_the_interior_equals_scikit_image() -> None:
    # Outside of a rectangle the images are equal: there the similarity is 1 whatever lies beyond the border.
    a, b = images(1, 60, 70, 3)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    mask = np.zeros((60, 70, 1))
    mask[20:40, 20:50] = 1
    mixed = torch.from_numpy(np.where(mask, a[0].numpy(), b[0].numpy()))
    _, full = skimage_similarity(mixed.double().numpy(), b[0].double().numpy(), channel_axis=2, full=True, **options)
    assert full.mean() < 0.99
    assert structural_similarity(mixed, b[0]).item() == pytest.approx(full.mean(), abs=2e-6)


def test_the_gradient_is_that_of_central_differences() -> None:
    a, b = images(1, 14, 17, 3)
    a.requires_grad_()
    structural_similarity(a, b).backward()
    direction = torch.randn(a.shape)
    moved = [twin(a.detach().double() + sign * 1e-5 * direction, b.double()).item() for sign in (1, -1)]
    assert (a.grad * direction).sum().item() == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=2e-3)


class TestProperties:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(height=st.integers(1, 30), width=st.integers(1, 30), seed=st.integers(0, 100))
    def test_it_is_symmetric_and_at_most_one(self, height: int, width: int, seed: int) -> None:
        a, b = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(seed))
        assert structural_similarity(a, b).item() == pytest.approx(structural_similarity(b, a).item(), abs=1e-6)
        assert structural_similarity(a, b) < 1
        assert structural_similarity(a, a).item() == pytest.approx(1, abs=1e-6)

    def test_equal_images_have_no_gradient(self) -> None:
        a, _ = images(1, 30, 30, 3)
        a.requires_grad_()
        structural_similarity(a, a.detach().clone()).backward()
        assert a.grad.abs().max() < 1e-6

    def test_flat_images_differ_by_luminance_alone(self) -> None:
        a, b = torch.full((50, 50, 3), 0.4), torch.full((50, 50, 3), 0.8)
        inside = structural_similarity(a, b).item()  # the borders see zeros, which cost structure as well
        assert inside == pytest.approx(
            twin(a[None].double(), b[None].double()).item(), abs=2e-4
        )  # no variance, in float32
        assert inside < (2 * 0.4 * 0.8 + 1e-4) / (0.4**2 + 0.8**2 + 1e-4)

    def test_images_of_a_batch_do_not_touch(self) -> None:
        a, b = images(3, 12, 20, 3)
        each = torch.stack([structural_similarity(x, y) for x, y in zip(a, b, strict=True)])
        assert structural_similarity(a, b).item() == pytest.approx(each.mean().item(), abs=1e-6)

    def test_the_gradient_is_the_same_bits_on_any_number_of_threads(self, restored_threads: None) -> None:
        a, b = images(1, 150, 40, 3)
        gradients = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = a.clone().requires_grad_()
            structural_similarity(leaf, b).backward()
            gradients.append(leaf.grad)
        assert all(torch.equal(gradients[0], other) for other in gradients[1:])

    def test_single_elements_as_on_cuda_equal_whole_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_modules.functional.splatting import structural_similarity as module

        a, b = images(2, 13, 9, 3)
        a.requires_grad_()
        whole = structural_similarity(a, b)
        (expected,) = torch.autograd.grad(whole, a)
        monkeypatch.setattr(module, "_elements_per_thread", lambda rows: 1)
        single = structural_similarity(a, b)
        assert single.item() == pytest.approx(whole.item(), abs=1e-6)
        torch.testing.assert_close(torch.autograd.grad(single, a)[0], expected)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_kernels_compile_for_cuda(tmp_path_factory: pytest.TempPathFactory) -> None:
    import warp as wp

    from lightning_modules.functional.kernels import similarity

    if not wp.get_cuda_supported_archs():
        pytest.skip("this build of Warp has no CUDA compiler")
    folder = tmp_path_factory.mktemp("kernels")
    wp.compile_aot_module(wp.get_module(similarity.__name__), arch=80, module_dir=str(folder))
