import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.bi_fusion.loss_settings import LossSettings
from lightning_modules.functional.bi_fusion.point_views import VariationSettings, split_views, turned_points


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_views_are_dealt_to_two_sides_that_share_none(frames, seed):
    has_frame = torch.tensor(frames)
    first, second = split_views(has_frame, np.random.default_rng(seed))
    number = has_frame.sum(1)
    assert torch.equal(first | second, has_frame)
    several = number > 1
    assert not (first & second)[several].any()
    assert torch.equal(first[~several], second[~several])
    assert ((first.sum(1) - second.sum(1))[several] == (number % 2)[several]).all()


def test_the_same_chance_deals_the_same_sides():
    has_frame = torch.ones(2, 6, dtype=torch.bool)
    one, again, other = (split_views(has_frame, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_turned_points_keep_heights_and_distances_up_to_one_factor():
    cloud = torch.rand(20, 6)
    (turned,) = turned_points([cloud], np.random.default_rng(0), VariationSettings(colour_noise=0.0, stretch=0.3))
    factors = torch.pdist(turned[:, :3]) / torch.pdist(cloud[:, :3])
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-4, atol=1e-5)
    assert 0.7 <= float(factors[0]) <= 1.3
    torch.testing.assert_close(turned[:, 2], factors[0] * cloud[:, 2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[:, 3:], cloud[:, 3:])
    assert not torch.allclose(turned[:, :2], cloud[:, :2], atol=0.1)


def test_recoloured_points_keep_the_order_of_brightness():
    cloud = torch.rand(20, 6)
    (turned,) = turned_points([cloud], np.random.default_rng(0), VariationSettings(colour_noise=0.05, stretch=0.0))
    assert ((turned[:, 3:] >= 0) & (turned[:, 3:] <= 1)).all()
    assert not torch.allclose(turned[:, 3:], cloud[:, 3:], atol=1e-3)
    inside = (turned[:, 3] > 0) & (turned[:, 3] < 1)
    assert torch.equal(cloud[inside, 3].argsort(), turned[inside, 3].argsort())


def test_consistency_sets_in_after_its_share_of_the_steps():
    losses = LossSettings(consistency=0.2, consistency_from=0.25, point_branch=0.5, text=0.8)
    assert [losses.weight("consistency", share) for share in (0.0, 0.25, 0.375, 0.5, 1.0)] == pytest.approx(
        [0, 0, 0.1, 0.2, 0.2]
    )
    assert LossSettings(consistency=0.2, consistency_from=0.0).weight("consistency", 0.0) == 0.2
    assert losses.weight("text", 0.3) == 0.8
    assert losses.weight("text_3d", 0.3) == 0.4


def test_consistency_alone_is_refused():
    with pytest.raises(ValueError, match="consistency alone is best where all features are the same"):
        LossSettings(distillation=0, text=0, consistency=1)
    with pytest.raises(ValueError, match="text is -1"):
        LossSettings(text=-1)
