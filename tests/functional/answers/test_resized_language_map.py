import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.answers.language_scene import relevancy_maps, render_language, resize_language_map
from lightning_modules.functional.answers.relevancy import contrast
from lightning_modules.functional.splatting.rasterization import prepare_view
from tests.functional.answers.test_language_scene import language_scene
from tests.functional.random_scenes import random_camera


def bilinear(image, width, height):
    """Plain loops: pixel centres at halves, clamped at the border, no antialiasing."""
    old_height, old_width = image.shape[:2]
    result = np.zeros((height, width, *image.shape[2:]))
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * old_height / height - 0.5, 0)
            u = max((x + 0.5) * old_width / width - 0.5, 0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
            above = image[top, left] * (1 - u + left) + image[top, right] * (u - left)
            below = image[bottom, left] * (1 - u + left) + image[bottom, right] * (u - left)
            result[y, x] = above * (1 - v + top) + below * (v - top)
    return result


@pytest.mark.parametrize("size", [(31, 20), (9, 7), (24, 16)])
def test_relevancy_at_another_size_is_that_of_the_resized_unit_features(size):
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    prompts = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), dim=1)
    view = render_language(language, prepare_view(language.gaussians, camera))
    resized = resize_language_map(language, view, *size)
    maps = relevancy_maps(language, resized, prompts)
    assert (resized.camera.width, resized.camera.height) == size
    assert maps.shape == (2, 4, size[1], size[0])
    for level, codebook in enumerate(language.codebooks):
        features = view.weights.double().unflatten(1, (2, 10))[:, level] @ codebook.double()
        units = F.normalize(features, dim=1, eps=1e-10).unflatten(0, (16, 24)).numpy()
        dense = torch.from_numpy(bilinear(units, *size)).flatten(0, 1)  # not normalised again
        cosines = dense @ prompts.double().T, dense @ language.negatives.double().T
        torch.testing.assert_close(maps[level].flatten(1).T.double(), contrast(*cosines, 10.0), atol=3e-5, rtol=0)


def test_the_views_own_size_changes_no_relevancy():
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    view = render_language(language, prepare_view(language.gaussians, camera))
    same = resize_language_map(language, view, 24, 16)
    prompts = torch.eye(8)[:2]
    torch.testing.assert_close(
        relevancy_maps(language, same, prompts), relevancy_maps(language, view, prompts), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(same.alpha, view.alpha)
