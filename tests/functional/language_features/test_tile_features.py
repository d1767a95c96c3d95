import pytest
import torch

from lightning_modules.functional.language_features.tile_features import encode_tiles, tile_format
from lightning_modules.functional.open_clip_loading import image_tower, random_open_clip


def colored_tiles(num_tiles: int = 5, size: int = 32) -> torch.Tensor:
    colors = torch.randint(0, 256, (num_tiles, 3, 1, 1), dtype=torch.uint8)
    return colors.expand(num_tiles, 3, size, size).contiguous()


def test_features_are_those_of_open_clips_tower_whatever_the_batch() -> None:
    import open_clip

    model = random_open_clip(1, embed_dim=16, image_size=32)
    assert isinstance(model, open_clip.model.CLIP)
    tiles = colored_tiles()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        expected = model.encode_image((tiles / 255 - mean) / std, normalize=True)
    features = encode_tiles(image_tower(model), tiles, batch_size=3)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(encode_tiles(image_tower(model), tiles, batch_size=1), expected)
    assert not features.requires_grad


def test_a_tower_of_its_own_mean_and_size_is_fed_by_them() -> None:
    tower = image_tower(random_open_clip(1, embed_dim=16, image_size=32))
    tower.image_mean, tower.image_std = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)
    assert tile_format(tower) == (32, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    tiles = colored_tiles()
    with torch.no_grad():
        expected = tower((tiles / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1))
    torch.testing.assert_close(encode_tiles(tower, tiles), torch.nn.functional.normalize(expected, dim=1))


def test_no_tiles_have_no_features() -> None:
    tower = image_tower(random_open_clip(0, embed_dim=16, image_size=32))
    assert encode_tiles(tower, torch.zeros(0, 3, 32, 32, dtype=torch.uint8)).shape == (0, 16)


def test_reduced_precision_gives_nearly_the_same_float32_unit_features() -> None:
    tower, tiles = image_tower(random_open_clip(0, embed_dim=64, image_size=32)), colored_tiles(8)
    features, half = (encode_tiles(tower, tiles, precision=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(8))
    assert 0 < (1 - (half * features).sum(dim=1)).max() < 1e-3


def test_autocast_copies_no_weights_for_every_token() -> None:
    tower, tiles = image_tower(random_open_clip(0, embed_dim=64, image_size=32)), colored_tiles(8)
    tower.requires_grad_(False)  # else torch does not copy them in any case
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        encode_tiles(tower, tiles, precision=torch.bfloat16)
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}  # by which torch 2.15 multiplies them


def test_random_towers_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    towers = [image_tower(random_open_clip(seed, embed_dim=16, image_size=32)) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    tiles = colored_tiles()
    first, again, other = (encode_tiles(tower, tiles) for tower in towers)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_differently_coloured_tiles_are_told_apart() -> None:
    colors = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=torch.uint8)
    tiles = colors[:, :, None, None].expand(4, 3, 32, 32).contiguous()
    features = encode_tiles(image_tower(random_open_clip(1, embed_dim=16, image_size=32)), tiles)
    assert (features @ features.T)[~torch.eye(4, dtype=torch.bool)].max() < 0.9


def test_models_that_are_no_clip_are_refused() -> None:
    with pytest.raises(ValueError, match="gives a Linear; allowed: a CLIP"):
        image_tower(torch.nn.Linear(2, 2))
