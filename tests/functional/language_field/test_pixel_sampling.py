import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.functional.language_field.pixel_sampling import sample_labelled_pixels


def maps():
    ids = torch.full((3, 8, 10), -1, dtype=torch.int32)
    ids[0, :2] = 0
    ids[2, 5, 3:] = 4
    return ids


@given(st.integers(1, 26), st.integers(0, 2**31))
def test_drawn_pixels_are_distinct_and_labelled(num_pixels, seed):
    pixels = sample_labelled_pixels(maps(), num_pixels, (seed, 3))
    assert len(pixels) == num_pixels
    assert pixels.unique().numel() == num_pixels
    assert (maps().flatten(1)[:, pixels] >= 0).any(0).all()


def test_zero_or_too_many_give_every_labelled_pixel_in_order():
    expected = torch.cat([torch.arange(20), torch.arange(53, 60)])
    assert torch.equal(sample_labelled_pixels(maps(), 0, (1,)), expected)
    assert torch.equal(sample_labelled_pixels(maps(), 1000, (1,)), expected)


def test_the_draw_is_a_pure_function_of_the_seeds():
    first = sample_labelled_pixels(maps(), 9, (1, 2, 3))
    torch.rand(17)
    assert torch.equal(first, sample_labelled_pixels(maps(), 9, (1, 2, 3)))
    assert not torch.equal(first, sample_labelled_pixels(maps(), 9, (1, 2, 4)))


def test_a_view_without_labels_gives_no_pixels():
    assert sample_labelled_pixels(torch.full((1, 4, 4), -1), 5, (0,)).shape == (0,)
