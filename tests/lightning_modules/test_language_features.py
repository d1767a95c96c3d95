"""The parts of feature extraction: which masks are encoded, in what company, and how their making is described."""

from functools import partial

import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor

from datamodules.batches import Photograph, PixelTruth
from lightning_modules.functional.language_features.graph_segmentation import GraphMasks
from lightning_modules.language_features import (
    LanguageFeatureModule,
    PhotoMasks,
    TileDescriber,
    WorldDescriber,
    distinct_masks,
    most_frequent,
)
from lightning_modules.networks.mask_features import RandomTiles


class CountedTiles(RandomTiles):
    """Keeps the number of tiles of each call."""

    def __init__(self) -> None:
        super().__init__(embed_dim=8, image_size=32)
        self.counts: list[int] = []

    def forward(self, tiles: UInt8[Tensor, "tiles 3 size size"]) -> Tensor:
        self.counts.append(len(tiles))
        return super().forward(tiles)


def random_photo(name: str = "a", seed: int = 0) -> Photograph:
    generator = torch.Generator().manual_seed(seed)
    return Photograph(name, torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8, generator=generator))


def random_masks(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 12, 16, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_equal_masks_are_found_in_all_levels() -> None:
    a, b, c = random_masks(3)
    distinct, rows = distinct_masks([torch.stack([a, b]), torch.stack([b]), random_masks(0), torch.stack([c, a, c])])
    assert torch.equal(distinct, torch.stack([a, b, c]))
    assert [level.tolist() for level in rows] == [[0, 1], [1], [], [2, 0, 2]]
    empty, rows = distinct_masks([random_masks(0)] * 4)
    assert empty.shape == (0, 12, 16)
    assert [len(level) for level in rows] == [0] * 4


def test_masks_of_all_photos_are_encoded_together_and_repeated_ones_once() -> None:
    describer = TileDescriber(CountedTiles())
    masks = random_masks(6)
    photos = [
        PhotoMasks(random_photo("a", 1), (masks[:4], masks[:2], masks[2:3], masks[3:4])),
        PhotoMasks(random_photo("b", 2), (masks[:0], masks[4:], masks[:0], masks[:1])),
    ]
    described = describer.describe(photos)
    assert describer.encoder.counts == [4 + 3]
    for photo, features in zip(photos, described, strict=True):
        for level, found in zip(photo.levels, features, strict=True):
            alone = describer.describe([photo._replace(levels=(level,) * 4)])[0][0]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(described[0][0][:2], described[0][1])


def test_photos_without_masks_have_features_of_the_right_width() -> None:
    levels = (random_masks(0),) * 4
    (features,) = TileDescriber(CountedTiles()).describe([PhotoMasks(random_photo(), levels)])
    assert [level.shape for level in features] == [(0, 8)] * 4


def test_most_pixels_decide_what_a_mask_shows() -> None:
    ids = torch.tensor([[0, 0, 2, 2], [1, 1, 1, 2]])
    left, right = torch.zeros(2, 2, 4, dtype=torch.bool)
    left[:, :2] = True
    right[:, 2:] = True
    assert most_frequent(torch.stack([left, right, left | right]), ids, 4).tolist() == [0, 2, 1]
    # 0 and 1 are as frequent in the left half, and 1 and 2 in the whole: the smaller id counts.


def test_each_level_is_described_by_its_own_things() -> None:
    ids = torch.stack([torch.full((12, 16), level) for level in range(3)])
    photo = random_photo()._replace(truth=PixelTruth(ids, torch.eye(3)))
    (features,) = WorldDescriber().describe([PhotoMasks(photo, (random_masks(1),) * 4)])
    assert [level.argmax(1).tolist() for level in features] == [[1], [0], [1], [2]]
    with pytest.raises(ValueError, match=r"what the pixels of a show.*OpenClipTiles"):
        WorldDescriber().describe([PhotoMasks(random_photo(), (random_masks(1),) * 4)])


def test_settings_name_what_decides_the_features() -> None:
    source = partial(GraphMasks, sigma=0.5)
    tiles = partial(RandomTiles, seed=3, batch_size=7)
    assert LanguageFeatureModule(source, tiles, iou=0.9).settings == {
        "mask_source": {"class": "GraphMasks", "sigma": 0.5},
        "suppression": {"iou": 0.9, "score": 0.7, "inner": 0.5},
        "describer": {"class": "RandomTiles", "seed": 3},
    }
    assert LanguageFeatureModule(GraphMasks, RandomTiles).settings["describer"] == {"class": "RandomTiles"}


def test_nothing_is_loaded_for_photos_that_are_done_or_damaged() -> None:
    def no_parts() -> GraphMasks:
        raise AssertionError("nothing is to be computed")

    module = LanguageFeatureModule(no_parts, no_parts)
    photos = [random_photo()._replace(is_done=True), random_photo("b")._replace(problem="torn")]
    (features,) = module.predict_step(photos, 0)
    assert (features.name, features.problem) == ("b", "torn")
