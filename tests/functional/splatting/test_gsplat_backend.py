import pytest
import torch

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting import gsplat_backend
from lightning_modules.functional.splatting.differentiable_rendering import render_with_gradients
from lightning_modules.functional.splatting.gaussians import GaussianScene
from tests.functional.random_scenes import facing_camera, random_camera, random_scene


def test_a_missing_library_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsplat_backend, "find_spec", lambda name: None)
    camera = facing_camera()
    with pytest.raises(ValueError, match=r"not installed: run `pip install -e '.\[gsplat\]'`.*backend 'warp'"):
        render_with_gradients(random_scene(0, camera), camera, backend="gsplat")


def test_gaussians_on_the_processor_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsplat_backend, "find_spec", lambda name: object())
    camera = facing_camera()
    with pytest.raises(ValueError, match=r"needs a CUDA device, but the Gaussians are on 'cpu'.*accelerator gpu"):
        render_with_gradients(random_scene(0, camera), camera, backend="gsplat")


def on_cuda(scene: GaussianScene, camera: Camera) -> tuple[GaussianScene, Camera]:
    moved = camera._replace(camera_from_world=camera.camera_from_world.cuda(), intrinsics=camera.intrinsics.cuda())
    return GaussianScene(*(parameter.cuda().requires_grad_() for parameter in scene)), moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(3))
def test_both_backends_agree_in_value_and_gradient(seed: int) -> None:
    pytest.importorskip("gsplat")
    camera = random_camera(seed)
    scene = random_scene(seed, camera, num_bases=16)
    scene = scene._replace(opacity_logits=scene.opacity_logits.clamp_max(3))  # no alpha between 0.99 and 0.999
    scene, camera = on_cuda(scene, camera)
    background = torch.tensor([0.2, 0.9, 0.4], device="cuda")
    upstream = torch.randn(camera.num_pixels, 3, device="cuda")
    results = []
    for backend in ("warp", "gsplat"):
        offsets = torch.zeros(scene.num_gaussians, 2, device="cuda", requires_grad=True)
        rendered = render_with_gradients(scene, camera, background, screen_offsets=offsets, backend=backend)
        gradients = torch.autograd.grad(rendered.rgb, [*scene, offsets], upstream)
        results.append((rendered, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    # A Gaussian's rim (alpha about 1/255) is cut differently, and summed over the pixels it counts.
    assert (ours.rgb - theirs.rgb).abs().mean() < 2e-3
    assert (ours.alpha - theirs.alpha).abs().mean() < 2e-3
    for name, a, b in zip([*scene._fields, "offsets"], our_gradients, their_gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(3))
def test_the_gpu_gives_the_same_picture_and_gradients(seed: int) -> None:
    camera = random_camera(seed)
    scene = GaussianScene(*(p.requires_grad_() for p in random_scene(seed, camera, num_bases=16)))
    upstream = torch.randn(camera.num_pixels, 3)
    rendered = render_with_gradients(scene, camera)
    expected = torch.autograd.grad(rendered.rgb, list(scene), upstream)
    moved_scene, moved_camera = on_cuda(GaussianScene(*(p.detach() for p in scene)), camera)
    on_gpu = render_with_gradients(moved_scene, moved_camera)
    is_same = (on_gpu.rgb.cpu() - rendered.rgb).abs().amax(1) < 1e-4
    assert is_same.float().mean() > 0.99  # rounding decides which side of a threshold a few pixels are on
    actual = torch.autograd.grad(on_gpu.rgb, list(moved_scene), upstream.cuda())
    for name, a, b in zip(scene._fields, actual, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(a.cpu().flatten(), b.flatten(), dim=0) > 0.999, name
