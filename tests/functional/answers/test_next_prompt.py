import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.answers.language_scene import relevancy_maps, render_language
from lightning_modules.functional.answers.next_prompt import negative_cosines, next_prompt_relevancy
from lightning_modules.functional.splatting.rasterization import prepare_view
from tests.functional.answers.test_language_scene import language_scene
from tests.functional.random_scenes import random_camera


@pytest.mark.parametrize("entries", [10, 16, 37], ids="{} entries".format)
def test_the_next_prompt_has_the_relevancy_of_a_fresh_one(entries):
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    view = render_language(language, prepare_view(language.gaussians, camera))
    filler = entries - 10  # codebooks longer and shorter than a register
    weights = F.pad(view.weights.unflatten(1, (2, 10)), (0, filler)).flatten(1)
    language = language._replace(codebooks=F.pad(language.codebooks, (0, 0, 0, filler), value=0.5))
    view = view._replace(weights=weights)
    negatives = negative_cosines(language, view)
    for seed in (5, 6):
        prompt = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        kept = next_prompt_relevancy(language, view, negatives, prompt)
        torch.testing.assert_close(kept, relevancy_maps(language, view, prompt[None])[:, 0], atol=2e-6, rtol=0)


def test_both_ways_to_the_next_prompt_agree():
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    view = render_language(language, prepare_view(language.gaussians, camera))
    negatives, prompt = negative_cosines(language, view), torch.ones(8)
    fused = next_prompt_relevancy(language, view, negatives, prompt)
    strided = view._replace(weights=view.weights.T.contiguous().T)  # not contiguous: takes the way of CUDA
    torch.testing.assert_close(fused, next_prompt_relevancy(language, strided, negatives, prompt), atol=2e-6, rtol=0)


def test_pixels_without_language_are_as_near_to_the_prompt_as_to_the_negatives():
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    view = render_language(language, prepare_view(language.gaussians, camera))
    view = view._replace(weights=torch.zeros_like(view.weights), norms=torch.zeros_like(view.norms))
    relevancy = next_prompt_relevancy(language, view, negative_cosines(language, view), torch.ones(8))
    assert torch.equal(relevancy, torch.full_like(relevancy, 0.5))


def test_a_scene_without_negatives_is_refused():
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    view = render_language(language, prepare_view(language.gaussians, camera))
    with pytest.raises(ValueError, match="negative"):
        negative_cosines(language._replace(negatives=language.negatives[:0]), view)
