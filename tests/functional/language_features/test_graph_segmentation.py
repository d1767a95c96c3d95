import logging

import numpy as np
import pytest
import torch
from skimage.segmentation import felzenszwalb
from torch import Tensor

from lightning_modules.functional.language_features.graph_segmentation import GraphMasks
from lightning_modules.functional.language_features.mask_sources import MaskSource
from lightning_modules.functional.language_features.mask_tiles import mask_map


def quarters() -> Tensor:
    photo = torch.zeros(40, 60, 3, dtype=torch.uint8)
    colors = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=torch.uint8)
    photo[:20, :30], photo[:20, 30:], photo[20:, :30], photo[20:, 30:] = colors
    return photo


def checkered(seed: int = 0) -> Tensor:
    cells = np.random.default_rng(seed).uniform(0, 255, (12, 16, 3)).repeat(8, 0).repeat(8, 1)
    return torch.from_numpy(cells.astype(np.uint8))


def test_flat_regions_become_masks() -> None:
    _, *levels = GraphMasks(scales=(1.0, 1.0, 1.0), sigma=0.0)(quarters())
    for masks, scores in levels:
        assert sorted(mask.nonzero().amin(dim=0).tolist() for mask in masks) == [[0, 0], [0, 30], [20, 0], [20, 30]]
        assert masks.sum(dim=(1, 2)).tolist() == [600] * 4
        assert scores.tolist() == [1.0] * 4


def test_the_levels_are_felzenszwalbs_segments_at_three_scales_and_default_is_all_of_them() -> None:
    photo = checkered()
    source = GraphMasks(scales=(10.0, 3000.0, 20_000.0))
    assert isinstance(source, MaskSource)
    default, *levels = source(photo)
    for (masks, _), scale, fraction in zip(levels, source.scales, source.min_fractions, strict=True):
        segments = felzenszwalb(photo.numpy(), scale=scale, sigma=0.8, min_size=round(fraction * 96 * 128))
        np.testing.assert_array_equal(mask_map(masks), segments)
        assert (masks.sum(dim=0) == 1).all()
    assert len(levels[0].masks) > len(levels[1].masks) > len(levels[2].masks)
    assert torch.equal(default.masks, torch.cat([level.masks for level in levels]))
    assert len(default.scores) == len(default.masks)


def test_it_says_once_that_it_is_not_segment_anything(caplog: pytest.LogCaptureFixture) -> None:
    source = GraphMasks()
    with caplog.at_level(logging.WARNING):
        source(quarters())
        source(quarters())
    (record,) = caplog.records
    assert "not Segment Anything" in record.message


def test_settings_for_other_than_three_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="need three numbers: s, m and l"):
        GraphMasks(scales=(1.0, 2.0))
