"""The shape checks of the test run are themselves tested: without a checker jaxtyping would check nothing."""

import pytest
import torch
from jaxtyping import TypeCheckError

from lightning_modules.functional.cameras import Camera, project_points
from lightning_modules.functional.language_field.sparse_codes import top_k_softmax


def test_a_wrong_shape_fails():
    with pytest.raises(TypeCheckError):
        top_k_softmax(torch.zeros(5, 64), 4)


def test_a_wrong_dtype_fails():
    camera = Camera(torch.eye(4), torch.eye(3), 4, 4)
    with pytest.raises(TypeCheckError):
        project_points(torch.zeros(3, 3, dtype=torch.int64), camera)


def test_the_right_shape_passes():
    entries, _ = top_k_softmax(torch.zeros(5, 2, 64), 4)
    assert entries.shape == (5, 2, 4)
