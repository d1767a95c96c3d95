import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.functional.depth_autoencoder.depth_range import (
    LEAST_VALID,
    DepthRange,
    depth_of_scaled,
    scale_depth,
)

SCALES = ("linear", "log", "inverse")


@pytest.mark.parametrize("scale", SCALES)
def test_the_ends_of_the_range_are_the_ends_of_the_scale(scale):
    scaled = scale_depth(torch.tensor([0.5, 8.0]), DepthRange(0.5, 8.0, scale))
    ends = [1.0, LEAST_VALID] if scale == "inverse" else [LEAST_VALID, 1.0]
    torch.testing.assert_close(scaled, torch.tensor(ends))


@pytest.mark.parametrize(("scale", "middle"), [("linear", 4.25), ("log", 2.0), ("inverse", 1 / 1.0625)])
def test_the_middle_of_the_scale_is_the_mean_of_its_kind(scale, middle):
    depth = depth_of_scaled(torch.tensor([(1 + LEAST_VALID) / 2]), DepthRange(0.5, 8.0, scale))
    torch.testing.assert_close(depth, torch.tensor([middle]))


@pytest.mark.parametrize("scale", SCALES)
@given(depth=st.lists(st.floats(0.3, 9), min_size=1, max_size=8))
def test_scaling_can_be_undone(scale, depth):
    depth_range = DepthRange(0.3, 9, scale)
    metres = torch.tensor(depth)
    torch.testing.assert_close(
        depth_of_scaled(scale_depth(metres, depth_range), depth_range), metres, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("scale", SCALES)
def test_pixels_without_depth_are_zero_and_no_other_is(scale):
    scaled = scale_depth(torch.tensor([0.0, 1e-6, 0.3, 9.0, 1e6]), DepthRange(0.3, 9.0, scale))
    assert scaled[0] == 0
    assert (scaled[1:] >= LEAST_VALID).all()
    assert (scaled <= 1).all()


def test_depth_beyond_the_range_is_clamped():
    scaled = scale_depth(torch.tensor([0.01, 100.0]), DepthRange(0.3, 9.0))
    torch.testing.assert_close(scaled, torch.tensor([LEAST_VALID, 1.0]))


@pytest.mark.parametrize("scale", SCALES)
def test_any_output_of_a_network_means_a_depth_within_the_range(scale):
    depth = depth_of_scaled(torch.tensor([-3.0, 0.0, 0.5, 7.0]), DepthRange(0.3, 9.0, scale))
    assert ((depth >= 0.3 - 1e-5) & (depth <= 9.0 + 1e-4)).all()


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, float("inf"))])
def test_an_impossible_range_is_refused(arguments):
    with pytest.raises(ValueError, match="allowed"):
        DepthRange(*arguments)
