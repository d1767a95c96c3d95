import numpy as np
import pytest
import torch

from datamodules.crop_features import OpenClipMaskEncoder, masked_crops, random_open_clip
from datamodules.segmentation import GraphSegmentation


def quarters() -> np.ndarray:
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:20, :30], photo[:20, 30:], photo[20:, :30], photo[20:, 30:] = (
        (250, 0, 0),
        (0, 250, 0),
        (0, 0, 250),
        (250, 250, 0),
    )
    return photo


def test_flat_regions_become_masks_without_gaps_in_their_ids() -> None:
    maps = GraphSegmentation(scales=(1.0, 1.0, 1.0), sigma=0.0).segment(quarters())
    assert maps.shape == (3, 40, 60)
    for level in maps:
        assert sorted(np.unique(level)) == [0, 1, 2, 3]
        assert all(
            len(np.unique(part)) == 1 for part in (level[:20, :30], level[:20, 30:], level[20:, :30], level[20:, 30:])
        )


def test_larger_scales_give_fewer_masks() -> None:
    rng = np.random.default_rng(0)
    photo = (rng.uniform(0, 255, (12, 16, 3)).repeat(8, 0).repeat(8, 1)).astype(np.uint8)
    counts = GraphSegmentation(scales=(10.0, 3000.0, 20_000.0)).segment(photo).max(axis=(1, 2)) + 1
    assert counts[0] > counts[1] > counts[2]


def test_settings_for_other_than_three_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="need three numbers: s, m and l"):
        GraphSegmentation(scales=(1.0, 2.0))


def test_crops_are_centred_squares_on_black_without_the_neighbours() -> None:
    photo = np.full((10, 12, 3), 200, np.uint8)
    photo[4:6, 2:8] = (255, 0, 0)
    mask_ids = np.full((10, 12), -1)
    mask_ids[4:6, 2:8] = 0
    mask_ids[9, 11] = 1  # one pixel in the corner
    crops = masked_crops(photo, mask_ids, 6)
    assert crops.shape == (2, 6, 6, 3)
    expected = np.zeros((6, 6, 3), np.uint8)
    expected[2:4] = (255, 0, 0)
    np.testing.assert_array_equal(crops[0], expected)
    assert (crops[1] == 200).all()


def test_a_map_without_masks_has_no_features() -> None:
    encoder = OpenClipMaskEncoder(random_open_clip(0, embed_dim=16, image_size=32))
    assert encoder.encode(quarters(), np.full((40, 60), -1)).shape == (0, 16)


def test_features_are_those_of_open_clips_tower_and_follow_from_the_seed() -> None:
    import open_clip

    model = random_open_clip(1, embed_dim=16, image_size=32)
    assert isinstance(model, open_clip.model.CLIP)
    photo = quarters()
    mask_ids = GraphSegmentation(scales=(1.0, 1.0, 1.0), sigma=0.0).segment(photo)[0]
    features = torch.from_numpy(OpenClipMaskEncoder(model, batch_size=3).encode(photo, mask_ids))
    pixels = torch.from_numpy(masked_crops(photo, mask_ids, 32)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        torch.testing.assert_close(features, model.encode_image((pixels - mean) / std, normalize=True))
    again = OpenClipMaskEncoder(random_open_clip(1, embed_dim=16, image_size=32)).encode(photo, mask_ids)
    torch.testing.assert_close(torch.from_numpy(again), features)
    other = OpenClipMaskEncoder(random_open_clip(2, embed_dim=16, image_size=32)).encode(photo, mask_ids)
    assert not np.allclose(other, features, atol=0.1)
    cosines = (features @ features.T)[~torch.eye(4, dtype=torch.bool)]
    assert cosines.max() < 0.9  # differently coloured masks are told apart


def test_a_random_tower_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    random_open_clip(0, embed_dim=16, image_size=32)
    assert torch.equal(torch.random.get_rng_state(), before)
