import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.functional.answers.gaussian_answers import (
    GaussianBaseline,
    best_level,
    gaussian_baseline,
    gaussian_classes,
    gaussian_relevancy,
    nearest_gaussians,
    score_peaks,
    smooth_scores,
)
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.answers.relevancy import relevancy
from lightning_modules.functional.language_field.sparse_codes import SparseCodes, densify_codes
from tests.functional.random_scenes import isotropic_scene, random_camera, random_scene


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def random_language(
    seed: int, num: int = 50, levels: int = 3, entries: int = 7, active: int = 8, channels: int = 16
) -> LanguageScene:
    """Codes in any order of levels, channels repeated within a row, coefficients of both signs."""
    generator = torch.Generator().manual_seed(seed)
    channel_ids = torch.randint(0, levels * entries, (num, active), generator=generator).short()
    values = torch.randn(num, active, generator=generator)
    codebooks = torch.randn(levels, entries, channels, generator=generator)
    codes = SparseCodes(channel_ids, values, levels * entries)
    return LanguageScene(random_scene(seed, random_camera(0), num), codes, codebooks, unit(3, channels, seed=seed + 1))


def decoded(language: LanguageScene) -> Tensor:
    """[L, N, C] features in double precision, by the dense matrix product."""
    dense = densify_codes(language.codes._replace(values=language.codes.values.double()))
    return dense.unflatten(1, (language.num_levels, -1)).transpose(0, 1) @ language.codebooks.double()


def dense_relevancy(language: LanguageScene, prompts: Tensor) -> Tensor:
    negatives = language.negatives.double()
    scores = torch.stack([relevancy(features, prompts.double(), negatives).T for features in decoded(language)])
    return scores * (decoded(language).norm(dim=2) > 0)[:, None]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    levels=st.integers(1, 4),
    active=st.integers(1, 14),
    prompts=st.sampled_from([0, 1, 3, 5, 21]),
)
def test_relevancy_of_gaussians_is_that_of_their_decoded_features(seed, levels, active, prompts):
    language = random_language(seed, levels=levels, active=active)
    texts = 3 * unit(prompts, 16, seed=seed + 2)
    ours = gaussian_relevancy(language, texts)
    assert ours.shape == (levels, prompts, 50)
    # Coefficients of both signs may cancel: the shorter a feature, the more of its direction is rounding.
    long_enough = (decoded(language).norm(dim=2) > 0.1)[:, None]
    torch.testing.assert_close(
        ours * long_enough, (dense_relevancy(language, texts) * long_enough).float(), atol=3e-5, rtol=0
    )


def test_lengths_and_best_negatives_are_those_of_the_decoded_features():
    language = random_language(3, active=12)
    features = decoded(language)
    baseline = gaussian_baseline(language)
    torch.testing.assert_close(baseline.norms.double(), features.norm(dim=2), atol=1e-5, rtol=1e-5)
    has_feature = features.norm(dim=2) > 0.1
    cosines = (F.normalize(features, dim=2) @ language.negatives.double().T).amax(dim=2)
    torch.testing.assert_close(baseline.negatives[has_feature].double(), cosines[has_feature], atol=1e-5, rtol=0)


def test_a_gaussian_without_language_is_never_an_answer():
    language = random_language(4)
    language.codes.values[7] = 0
    language.codes.values[9, :] = 0
    prompts = unit(2, 16, seed=5)
    scores = gaussian_relevancy(language, prompts)
    assert (scores[:, :, [7, 9]] == 0).all()
    class_ids, best = gaussian_classes(language, prompts, min_relevancy=0.0)
    assert class_ids[[7, 9]].tolist() == [-1, -1]
    assert best[[7, 9]].tolist() == [0, 0]


def test_coefficients_that_cancel_leave_no_language():
    language = random_language(6, num=1, levels=1, active=2)
    language.codes.channel_ids[0] = 3
    language.codes.values[0] = torch.tensor([0.75, -0.75])
    assert gaussian_baseline(language).norms.item() == 0


def test_a_baseline_at_hand_changes_nothing():
    language = random_language(7)
    prompts = unit(3, 16, seed=8)
    baseline = gaussian_baseline(language)
    assert torch.equal(gaussian_relevancy(language, prompts, baseline=baseline), gaussian_relevancy(language, prompts))


def test_results_do_not_depend_on_the_number_of_threads():
    language = random_language(9, num=700, active=12)
    prompts = unit(2, 16, seed=10)
    several = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gaussian_relevancy(language, prompts)
    finally:
        torch.set_num_threads(several)
    assert torch.equal(one, gaussian_relevancy(language, prompts))


def test_a_gaussian_made_of_the_prompt_alone_is_as_relevant_as_the_prompt_itself():
    texts, negatives = unit(1, 16, seed=11), unit(4, 16, seed=12)
    codes = SparseCodes(torch.zeros(1, 1, dtype=torch.int16), torch.tensor([[0.3]]), 1)
    language = LanguageScene(random_scene(0, random_camera(0), 1), codes, 5 * texts[None], negatives)
    expected = torch.sigmoid(10 * (1 - (negatives @ texts.T).amax()))
    torch.testing.assert_close(gaussian_relevancy(language, texts)[0, 0, 0], expected)


def test_the_best_level_is_the_one_whose_peak_is_highest():
    scores = torch.full((3, 2, 2000), 0.3)
    scores[0, :, 0] = 1.0  # a lone outlier: the mean of the highest two is 0.65
    scores[1, 0, :40] = 0.7
    scores[2, 1, :40] = 0.7
    best, levels = best_level(scores)
    assert levels.tolist() == [1, 2]
    assert torch.equal(best, torch.stack([scores[1, 0], scores[2, 1]]))


def test_the_peak_of_few_scores_is_their_maximum():
    scores = torch.rand(2, 3, 9)
    assert torch.equal(score_peaks(scores), scores.amax(dim=2))


@pytest.mark.parametrize("num_prompts", [1, 8, 19])
def test_classes_are_the_best_fitting_prompts_at_their_own_best_levels(num_prompts):
    language = random_language(13, num=120, channels=256)
    prompts = unit(num_prompts, 256, seed=99)
    answers, _ = best_level(gaussian_relevancy(language, prompts))
    scores, ids = answers.max(dim=0)
    least = float(scores.sort().values[59:61].mean())
    class_ids, best = gaussian_classes(language, prompts, min_relevancy=least)
    torch.testing.assert_close(best, scores)
    assert torch.equal(class_ids, torch.where(scores >= least, ids, -1))
    assert (class_ids < 0).any()


def test_missing_texts_are_named():
    language = random_language(15)
    with pytest.raises(ValueError, match="at least one negative"):
        gaussian_baseline(language._replace(negatives=language.negatives[:0]))
    with pytest.raises(ValueError, match="at least one prompt"):
        gaussian_classes(language, unit(0, 16, seed=0))
    with pytest.raises(ValueError, match=r"min_relevancy .* got 1.5"):
        gaussian_classes(language, unit(1, 16, seed=0), min_relevancy=1.5)


def test_the_baseline_has_one_number_per_level_and_gaussian():
    language = random_language(16)
    assert [part.shape for part in gaussian_baseline(language)] == [(3, 50)] * len(GaussianBaseline._fields)


def literal_smoothing(scores: Tensor, neighbours: Tensor, opacities: Tensor) -> list[float]:
    smoothed = []
    for own, row in zip(scores.tolist(), neighbours.tolist(), strict=True):
        pairs = [(float(opacities[j]), float(scores[j])) for j in row if scores[j] > 0]
        average = sum(w * s for w, s in pairs) / sum(w for w, _ in pairs) if pairs else 0.0
        smoothed.append((own + average) / 2 if own > 0 else average)
    return smoothed


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9))
def test_smoothing_is_half_the_score_and_half_the_average_of_the_neighbours(seed, count):
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(12, 3, generator=generator).tolist()
    scene = isotropic_scene(means, [0.1] * 12, (0.1 + 0.8 * torch.rand(12, generator=generator)).tolist())
    scores = torch.rand(12, generator=generator) * (torch.rand(12, generator=generator) > 0.3)
    neighbours = nearest_gaussians(scene, count)
    assert neighbours.shape == (12, count)
    assert torch.equal(neighbours[:, 0], torch.arange(12))
    ours = smooth_scores(scores, neighbours, scene.opacities)
    torch.testing.assert_close(ours, torch.tensor(literal_smoothing(scores, neighbours, scene.opacities)))


def test_a_scene_of_fewer_gaussians_has_fewer_neighbours():
    assert nearest_gaussians(random_scene(0, random_camera(0), 3), 8).shape == (3, 3)


def test_smoothed_classes_are_those_of_the_smoothed_scores():
    language = random_language(17, num=120, channels=256)
    language.codes.values[5] = 0
    prompts, neighbours = unit(3, 256, seed=98), nearest_gaussians(language.gaussians, 6)
    answers, _ = best_level(gaussian_relevancy(language, prompts))
    smooth = torch.stack([smooth_scores(own, neighbours, language.gaussians.opacities) for own in answers])
    scores, ids = smooth.max(dim=0)
    class_ids, best = gaussian_classes(language, prompts, min_relevancy=0.1, neighbours=neighbours)
    torch.testing.assert_close(best, scores)
    assert torch.equal(class_ids, torch.where(scores >= 0.1, ids, -1))
    assert class_ids[5] >= 0  # it has no language, but its neighbours have
