import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.bi_fusion.dense_clip import dense_tokens, tower_hash
from lightning_modules.functional.open_clip_loading import image_tower
from lightning_modules.networks.bi_fusion.clip_tokens import ClipTokens, DenseClip, RandomClipTokens
from tests.functional.bi_fusion.tiny_clip import tiny_clip

MODES = ("vanilla", "maskclip", "sclip", "clearclip")


def photos(number=2, height=32, width=32):
    return torch.randint(0, 256, (number, height, width, 3), dtype=torch.uint8)


def dense_clip(**settings):
    return DenseClip(image_tower(tiny_clip()), **{"use_amp": False} | settings)


def test_photos_are_normalised_as_open_clip_does():
    import open_clip

    model, images = tiny_clip(), photos(3)
    transform = open_clip.image_transform(32, is_train=False, mean=None, std=None, resize_mode="squash")
    from PIL import Image

    pixels = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    with torch.no_grad():
        expected = dense_tokens(model.visual, pixels, "clearclip")
        embedding = model.encode_image(pixels, normalize=True)
    ours = dense_clip()(images)
    torch.testing.assert_close(ours.tokens, expected.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.clip_global, embedding, atol=1e-6, rtol=1e-5)
    assert ours.teacher_tokens is ours.tokens
    assert ours.tokens.shape == (3, 64, 4, 4)


def test_the_projection_takes_tokens_to_the_space_of_texts():
    model, clip = tiny_clip(), dense_clip(dense_mode="vanilla")
    assert torch.equal(clip.projection, model.visual.proj)
    with torch.no_grad():
        x = model.visual._embeds(torch.zeros(1, 3, 32, 32))
        classes = model.visual.ln_post(model.visual.transformer(x))[:, 0] @ clip.projection
        torch.testing.assert_close(classes, model.encode_image(torch.zeros(1, 3, 32, 32)))
    assert not clip.projection.requires_grad


def test_a_frozen_tower_is_not_saved_trained_or_put_in_training_mode():
    clip = dense_clip().train()
    assert not clip.state_dict()
    assert not list(clip.parameters())
    assert not any(module.training for module in clip.visual.modules())
    assert not any(parameter.requires_grad for parameter in clip.visual.parameters())
    around = torch.nn.Sequential(clip, torch.nn.Linear(2, 2))
    assert list(around.state_dict()) == ["1.weight", "1.bias"]
    around.load_state_dict(around.state_dict())
    assert not dense_clip()(photos()).tokens.requires_grad


def test_the_tower_follows_dtypes_and_devices_unless_it_is_offloaded():
    images = photos()
    expected = dense_clip()(images)
    clip = torch.nn.Sequential(dense_clip()).double()[0]
    assert {parameter.dtype for parameter in clip.visual.parameters()} == {torch.float64}
    torch.testing.assert_close(clip(images).tokens, expected.tokens, atol=1e-4, rtol=1e-4)
    assert next(dense_clip().to("meta").visual.parameters()).device.type == "meta"
    offloaded = dense_clip(cpu_offload=True, freeze_blocks=1).to("meta")
    assert next(offloaded.visual.parameters()).device.type == "cpu"
    assert next(offloaded.trained_blocks.parameters()).device.type == "meta"
    torch.testing.assert_close(dense_clip(cpu_offload=True).double()(images).tokens, expected.tokens)
    half = dense_clip().bfloat16()(images)
    assert F.cosine_similarity(half.tokens, expected.tokens, dim=1).min() > 0.99


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("freeze_blocks", [1, 2, 3])
def test_the_last_blocks_are_trained_from_the_towers_own_weights_while_the_teacher_stays(mode, freeze_blocks):
    frozen, clip, images = (
        dense_clip(dense_mode=mode),
        dense_clip(dense_mode=mode, freeze_blocks=freeze_blocks),
        photos(),
    )
    before, after = frozen(images), clip(images)
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert after.tokens.requires_grad
    assert not after.teacher_tokens.requires_grad
    assert len(clip.trained_blocks) == freeze_blocks
    after.tokens.square().mean().backward()
    trained = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for p in trained.values())  # a process group waits for every one of them
    assert all(p.grad is None for p in clip.visual.parameters())
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.1 * parameter.grad.sign()
    moved = clip(images)
    assert (moved.tokens - before.tokens).abs().max() > 0.01
    torch.testing.assert_close(moved.teacher_tokens, before.tokens, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moved.clip_global, before.clip_global, atol=1e-6, rtol=1e-5)
    assert clip.weight_hash == frozen.weight_hash == tower_hash(tiny_clip().visual)


def test_trained_blocks_are_saved_and_restored():
    clip, images = dense_clip(freeze_blocks=1), photos()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    other = dense_clip(freeze_blocks=1)
    other.load_state_dict(clip.state_dict())
    assert torch.equal(other(images).tokens, clip(images).tokens)
    assert not torch.equal(copy.deepcopy(clip)(images).tokens, dense_clip()(images).tokens)


@pytest.mark.parametrize("freeze_blocks", [-1, 4])
def test_more_blocks_than_there_are_cannot_be_trained(freeze_blocks):
    with pytest.raises(
        ValueError, match=rf"freeze_blocks is {freeze_blocks}; allowed: 0 \(everything is frozen\) to 3"
    ):
        dense_clip(freeze_blocks=freeze_blocks)


@pytest.mark.parametrize("is_native", [True, False])
def test_amp_is_bfloat16_on_cpus_that_multiply_it_and_otherwise_exact(monkeypatch, is_native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    images = photos()
    exact, amp = dense_clip()(images), dense_clip(use_amp=True)(images)
    assert torch.equal(amp.tokens, exact.tokens) != is_native
    assert amp.tokens.dtype == amp.clip_global.dtype == torch.float32
    assert F.cosine_similarity(amp.tokens, exact.tokens, dim=1).min() > 0.998
    with torch.autocast("cpu", torch.bfloat16):  # the trainer's precision is not the tower's
        assert torch.equal(dense_clip()(images).tokens, exact.tokens)


def test_weights_of_a_local_file_are_loaded(tmp_path: Path):
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 512, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-dense.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-dense.json")
    model = open_clip.create_model("tiny-dense").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    clip = ClipTokens("tiny-dense", str(tmp_path / "weights.pt"), use_amp=False)
    assert clip.weight_hash == tower_hash(model.visual)
    assert clip(photos()).tokens.shape == (2, 32, 2, 2)


def test_random_towers_follow_from_the_seed():
    images = photos(2, 48, 32)
    first, again, other = (RandomClipTokens(seed, 16, 32)(images) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.allclose(first.tokens, other.tokens, atol=0.1)
    assert first.clip_global.shape == (2, 16)
    assert first.tokens.shape == (2, 128, 3, 2)
    torch.testing.assert_close(first.clip_global.norm(dim=1), torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_on_cuda_is_close_to_float32_on_cpu():
    images = photos()
    exact, half = dense_clip()(images), dense_clip(use_amp=True).cuda()(images.cuda())
    assert half.tokens.device.type == "cuda"
    assert F.cosine_similarity(half.tokens.cpu(), exact.tokens, dim=1).min() > 0.999
    offloaded = dense_clip(cpu_offload=True).cuda()(images.cuda())
    torch.testing.assert_close(offloaded.tokens.cpu(), exact.tokens)
