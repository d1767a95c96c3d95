import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.bi_fusion.dense_clip import check_tower, dense_tokens, tower_hash
from lightning_modules.functional.open_clip_loading import image_tower
from tests.functional.bi_fusion.tiny_clip import tiny_clip

MODES = ("vanilla", "maskclip", "sclip", "clearclip")


def pictures(number=2, height=32, width=32):
    return torch.randn(number, 3, height, width)


def block_twin(block, x, mode):
    """The last block of one image, head by head and patch by patch, in float64 from the modes' equations."""
    state = {name: value.detach().double() for name, value in block.state_dict().items()}
    normed = F.layer_norm(x, x.shape[-1:], state["ln_1.weight"], state["ln_1.bias"])
    q, k, v = (normed @ state["attn.in_proj_weight"].T + state["attn.in_proj_bias"]).chunk(3, dim=-1)
    heads, width = 4, x.shape[-1] // 4
    mixed = torch.zeros_like(x)
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        for i in range(len(x)):
            by_query = torch.stack([q[i, own] @ q[j, own] for j in range(len(x))]) / math.sqrt(width)
            by_key = torch.stack([k[i, own] @ k[j, own] for j in range(len(x))]) / math.sqrt(width)
            cross = torch.stack([q[i, own] @ k[j, own] for j in range(len(x))]) / math.sqrt(width)
            share = {
                "vanilla": cross.softmax(0),
                "maskclip": torch.eye(len(x), dtype=torch.float64)[i],
                "sclip": by_query.softmax(0) + by_key.softmax(0),
                "clearclip": by_query.softmax(0),
            }[mode]
            mixed[i, own] = share @ v[:, own]
    out = mixed @ state["attn.out_proj.weight"].T + state["attn.out_proj.bias"]
    if mode in ("maskclip", "clearclip"):
        return out
    x = x + out
    normed = F.layer_norm(x, x.shape[-1:], state["ln_2.weight"], state["ln_2.bias"])
    inner = F.gelu(normed @ state["mlp.c_fc.weight"].T + state["mlp.c_fc.bias"])
    return x + inner @ state["mlp.c_proj.weight"].T + state["mlp.c_proj.bias"]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_every_mode_equals_its_equation_in_float64(mode):
    visual, images = tiny_clip().visual, pictures(1)
    before = visual.forward_intermediates(images, indices=[1], output_extra_tokens=True, output_fmt="NLC")
    x = torch.cat([before["image_intermediates_prefix"][0], before["image_intermediates"][0]], dim=1)[0].double()
    expected = block_twin(visual.transformer.resblocks[-1], x, mode)
    expected = F.layer_norm(expected, (64,), visual.ln_post.weight.double(), visual.ln_post.bias.double())
    tokens = dense_tokens(visual, images, mode).tokens
    torch.testing.assert_close(tokens[0].double().flatten(1).T, expected[1:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_embeddings_are_open_clips_own_in_every_mode(mode, pool_type):
    model, images = tiny_clip(pool_type=pool_type), pictures(3)
    expected = model.encode_image(images, normalize=True)
    for visual in (model.visual, image_tower(model)):  # with the images first, then with the tokens first
        torch.testing.assert_close(dense_tokens(visual, images, mode).clip_global, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_vanilla_tokens_are_open_clips_last_intermediates():
    model, images = tiny_clip(), pictures(3)
    expected = model.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    tokens, clip_global, teacher = dense_tokens(model.visual, images, "vanilla")
    assert tokens.shape == (3, 64, 4, 4)
    torch.testing.assert_close(tokens, expected["image_intermediates"][-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip_global, F.normalize(expected["image_features"], dim=1), atol=1e-6, rtol=1e-5)
    assert teacher is tokens


@torch.no_grad()
def test_projected_tokens_are_open_clips_where_it_returns_them():
    model, images = tiny_clip(pool_type="tok"), pictures(2)
    model.visual.output_tokens = True
    pooled, tokens = model.visual(images)
    ours = dense_tokens(model.visual, images, "vanilla")
    torch.testing.assert_close(ours.tokens.flatten(2).mT, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.clip_global, F.normalize(pooled, dim=1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_maskclip_keeps_patches_apart_and_clearclip_joins_those_of_alike_queries():
    visual, images = tiny_clip().visual, pictures(1)
    last = visual.transformer.resblocks[-1]
    last.attn.in_proj_weight[:64] = 0  # queries that are all the same
    last.attn.in_proj_bias[:64] = 0
    joined = dense_tokens(visual, images, "clearclip").tokens.flatten(2)
    torch.testing.assert_close(joined, joined[..., :1].expand_as(joined), atol=1e-5, rtol=1e-5)
    apart = dense_tokens(visual, images, "maskclip").tokens.flatten(2)[0].T
    assert torch.pdist(apart).min() > 0.1


@torch.no_grad()
def test_other_sizes_get_the_positions_that_open_clip_would_load():
    from open_clip.model import resize_pos_embed

    model = tiny_clip()
    images = pictures(1, 48, 64)
    larger = tiny_clip(image_size=(48, 64))
    state = model.state_dict()
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    ours = dense_tokens(model.visual, images, "vanilla")
    assert ours.tokens.shape == (1, 64, 6, 8)
    expected = larger.visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    torch.testing.assert_close(ours.tokens, expected["image_intermediates"][-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.clip_global, larger.encode_image(images, normalize=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_images_do_not_depend_on_the_rest_of_the_batch(mode):
    visual, images = image_tower(tiny_clip()), pictures(4)
    whole = dense_tokens(visual, images, mode)
    single = dense_tokens(visual, images[2:3], mode)
    torch.testing.assert_close(whole.tokens[2:3], single.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.clip_global[2:3], single.clip_global, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_autocast_on_cpu_copies_no_weights_for_every_image(mode):
    visual, images = image_tower(tiny_clip()).requires_grad_(False), pictures(4)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.autocast("cpu", torch.bfloat16),
    ):
        half = dense_tokens(visual, images, mode)
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}  # by which torch 2.15 multiplies them
    assert half.tokens.dtype == half.clip_global.dtype == torch.float32
    exact = dense_tokens(visual, images, mode)
    assert F.cosine_similarity(half.tokens, exact.tokens, dim=1).min() > 0.998
    assert F.cosine_similarity(half.clip_global, exact.clip_global, dim=1).min() > 0.999


def test_sizes_that_are_no_multiple_of_patches_are_refused():
    with pytest.raises(ValueError, match=r"images are 30 x 32; allowed: multiples of the tower's patch, \(8, 8\)"):
        dense_tokens(tiny_clip().visual, pictures(1, 30), "vanilla")


def test_towers_and_modes_without_a_definition_are_refused():
    with pytest.raises(ValueError, match="dense_mode is 'clip'; allowed: vanilla, maskclip, sclip, clearclip"):
        check_tower(tiny_clip().visual, "clip")
    for visual in (torch.nn.Linear(2, 2), tiny_clip(attentional_pool=True).visual):
        with pytest.raises(ValueError, match=f"model_name gives a {type(visual).__name__} whose patches"):
            check_tower(visual, "vanilla")


def test_the_hash_is_that_of_the_weights():
    visual = tiny_clip().visual
    assert tower_hash(visual) == tower_hash(tiny_clip().visual)
    assert tower_hash(visual) != tower_hash(tiny_clip(1).visual)
    before = tower_hash(visual)
    visual.proj.data[0, 0] += 1e-3
    assert tower_hash(visual) != before
