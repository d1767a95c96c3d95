import math

import torch

from lightning_modules.functional.splatting.image_quality import peak_signal_to_noise


def test_a_constant_error_of_a_tenth_is_twenty_decibels():
    image = torch.full((4, 5, 3), 0.5)
    assert math.isclose(peak_signal_to_noise(image + 0.1, image), 20.0, rel_tol=1e-5)


def test_equal_images_have_no_noise():
    image = torch.rand(4, 5, 3)
    assert peak_signal_to_noise(image, image) == math.inf


def test_a_rendering_brighter_than_white_counts_as_white():
    assert peak_signal_to_noise(torch.full((2, 2, 3), 7.0), torch.ones(2, 2, 3)) == math.inf
