import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.answers.gaussian_components import SelectionSettings
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.answers.selection_protocol import SelectionSilhouettes, silhouette
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization_reference import dense_weights
from tests.functional.random_scenes import facing_camera, isotropic_scene, random_camera, random_scene

RAW = SelectionSettings(smoothing_neighbours=1)


def two_balls() -> LanguageScene:
    """A ball that hides a second one, and a wall behind both; each has a feature of its own."""
    scene = isotropic_scene([[0.0, 0.0, 2.0], [0.0, 0.0, 4.0], [0.0, 0.0, 8.0]], [0.2, 0.2, 4.0], [0.95, 0.95, 0.95])
    codes = SparseCodes(torch.tensor([[0], [1], [2]], dtype=torch.int16), torch.ones(3, 1), 3)
    return LanguageScene(scene, codes, torch.eye(4)[None, :3], torch.eye(4)[3:])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_silhouette_is_where_the_reference_rasterizer_is_opaque(seed):
    camera = random_camera(seed)
    scene = random_scene(seed, camera)
    alpha = (
        dense_weights(scene, camera, torch.arange(camera.num_pixels))
        .sum(dim=1)
        .unflatten(0, (camera.height, camera.width))
    )
    is_clear = (alpha - 0.7).abs() > 1e-4
    assert is_clear.float().mean() > 0.99
    assert torch.equal(silhouette(scene, camera)[is_clear], (alpha > 0.7)[is_clear])


def test_what_stands_in_front_of_a_selection_does_not_hide_it():
    language, camera = two_balls(), facing_camera(48, 36)
    near, far = SelectionSilhouettes(language, RAW).masks(camera, ("near", "far"), torch.eye(4)[:2])
    assert torch.equal(far, silhouette(GaussianScene(*(part[1:2] for part in language.gaussians)), camera))
    assert 0 < far.sum() < near.sum()
    assert near[far].all()


def test_a_prompt_is_asked_once_and_drawn_in_every_view():
    silhouettes, camera = SelectionSilhouettes(two_balls(), RAW), facing_camera(48, 36)
    first = silhouettes.masks(camera, ("near",), torch.eye(4)[:1])
    again = silhouettes.masks(camera, ("near",), F.normalize(torch.ones(1, 4)))  # its selection is known
    assert torch.equal(first, again)
    smaller = silhouettes.masks(facing_camera(24, 18, 25.0), ("near",), torch.eye(4)[:1])
    assert smaller.shape == (1, 18, 24)


def test_a_prompt_that_selects_nothing_has_an_empty_silhouette():
    nothing = SelectionSettings(smoothing_neighbours=1, threshold_scale="relevancy", threshold=1.0)
    masks = SelectionSilhouettes(two_balls(), nothing).masks(facing_camera(16, 12), ("near",), torch.eye(4)[:1])
    assert masks.shape == (1, 12, 16)
    assert not masks.any()


def test_no_prompt_has_no_silhouette():
    masks = SelectionSilhouettes(two_balls(), RAW).masks(facing_camera(16, 12), (), torch.zeros(0, 4))
    assert masks.shape == (0, 12, 16)
