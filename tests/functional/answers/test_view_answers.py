import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.answers.language_scene import (
    LanguageMap,
    LanguageScene,
    relevancy_maps,
    render_language,
)
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings, segment
from lightning_modules.functional.answers.view_answers import (
    MIN_ALPHA,
    Prompts,
    answer_prompts,
    answer_view,
    class_map,
    nearest_prompts,
)
from lightning_modules.functional.splatting.rasterization import prepare_view
from tests.functional.answers.test_language_scene import language_scene
from tests.functional.random_scenes import random_camera

PROTOCOL = ProtocolSettings(relevancy_pool=5, mask_pool=3)


def texts(count: int) -> Prompts:
    embeddings = F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(5)), dim=1)
    return Prompts(tuple(f"prompt {number}" for number in range(count)), embeddings)


@pytest.fixture(scope="module")
def scene() -> tuple[LanguageScene, LanguageMap]:
    camera = random_camera(0, 34, 26)
    language = language_scene(camera, num_gaussians=12)
    return language, render_language(language, prepare_view(language.gaussians, camera))


def test_three_renders_answer_as_one_does():
    camera = random_camera(3, 40, 30)
    language = language_scene(camera, num_gaussians=80)
    view = prepare_view(language.gaussians, camera)
    quick, standard = (render_language(language, view, passes) for passes in ("quick", "standard"))
    torch.testing.assert_close(standard.weights, quick.weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.alpha, quick.alpha, atol=1e-5, rtol=0)
    maps = [relevancy_maps(language, rendered, texts(4).embeddings) for rendered in (quick, standard)]
    torch.testing.assert_close(*maps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 3, 7, 50])
def test_blocks_change_no_answer_and_are_no_larger_than_asked(scene, block):
    language, view = scene
    prompts = texts(7)
    whole = segment(relevancy_maps(language, view, prompts.embeddings), PROTOCOL)
    answers = list(answer_prompts(language, view, prompts, PROTOCOL, block=block))
    assert max(len(answer.prompts) for answer in answers) <= block
    assert sum((answer.prompts for answer in answers), ()) == prompts.texts
    torch.testing.assert_close(torch.cat([answer.relevancy for answer in answers]), whole.relevancy)
    assert torch.equal(torch.cat([answer.masks for answer in answers]), whole.masks)
    assert torch.equal(torch.cat([answer.scores.levels for answer in answers]), whole.levels)


def test_scores_are_those_of_the_maps(scene):
    language, view = scene
    (answers,) = answer_prompts(language, view, texts(4), PROTOCOL)
    whole = segment(relevancy_maps(language, view, texts(4).embeddings), PROTOCOL)
    for level in range(2):
        for prompt in range(4):
            values, mask = whole.level_relevancy[level, prompt].numpy(), whole.level_masks[level, prompt].numpy()
            y, x = np.unravel_index(values.argmax(), values.shape)
            assert answers.scores.peak_pixels[level, prompt].tolist() == [x, y]
            assert answers.scores.peaks[level, prompt] == values.max()
            assert answers.scores.mask_areas[level, prompt] == mask.sum()
            mean = values[mask].mean() if mask.any() else 0.0
            assert float(answers.scores.mean_in_mask[level, prompt]) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("block", [2, 9])
def test_each_pixel_gets_the_class_that_fits_best_at_any_level(scene, block):
    language, view = scene
    embeddings = texts(9).embeddings
    ids = class_map(language, view, embeddings, min_relevancy=0.6, block=block)
    best = relevancy_maps(language, view, embeddings).amax(dim=0)
    covered = view.alpha.unflatten(0, ids.shape) >= MIN_ALPHA
    expected = torch.where(covered & (best.amax(dim=0) > 0.6), best.argmax(dim=0), -1)
    assert torch.equal(ids, expected)
    assert {-1} < set(ids.unique().tolist())
    assert bool((class_map(language, view, embeddings, min_relevancy=1.0) == -1).all())


def test_nearest_prompts_are_the_relevancy_maps_at_that_pixel(scene):
    language, view = scene
    embeddings = texts(5).embeddings
    maps = relevancy_maps(language, view, embeddings)
    here = nearest_prompts(language, view, 12 * 34 + 20, embeddings)
    torch.testing.assert_close(here, maps[:, :, 12, 20], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"pixel_id is 884; allowed in a view of 34 x 26: 0 to 883"):
        nearest_prompts(language, view, 34 * 26, embeddings)


def test_a_view_without_pictures_or_prompts_has_none():
    camera = random_camera(1, 20, 16)
    language = language_scene(camera)
    answer = answer_view(
        language, prepare_view(language.gaussians, camera), "x", texts(0), PROTOCOL, with_pictures=False
    )
    assert answer.pictures is None
    assert answer.class_ids is None
    assert list(answer.answers) == []
