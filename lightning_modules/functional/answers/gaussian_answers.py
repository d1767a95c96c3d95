"""What each Gaussian says to a prompt, without rendering and without decoding a feature.

A Gaussian's decoded feature mixes the few codebook entries of its codes, so its product with a text is a few look-ups
and its length a few pairs of the Gram matrix (:mod:`lightning_modules.functional.language_field.coefficient_space`).
The relevancy is that of the pixels: of the L2-normalised decoded feature.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.language_field.coefficient_space import MIN_NORM, gram_matrix
from lightning_modules.functional.splatting.gaussians import GaussianScene

PEAK_SHARE = 1e-3
"""The peak of a score over a scene is the mean of its highest thousandth: a lone floater does not decide it."""

PROMPTS_AT_ONCE = 8  # of a table of many prompts: bounds the temporaries


class GaussianBaseline(NamedTuple):
    """What every prompt needs of a scene's Gaussians; keep it, and a prompt costs a few look-ups per Gaussian.

    Attributes:
        norms: [L, N] lengths of the decoded features, 0 where a Gaussian has no language.
        negatives: [L, N] highest cosine to a negative phrase.
    """

    norms: Float[Tensor, "levels gaussians"]
    negatives: Float[Tensor, "levels gaussians"]


@torch.no_grad()
def gaussian_baseline(language: LanguageScene) -> GaussianBaseline:
    """Measures all Gaussians' decoded features and compares them with the negatives.

    Raises:
        ValueError: If the scene has no negative phrase.
    """
    from lightning_modules.functional.kernels import gaussian_answers, launch

    if language.negatives.shape[0] == 0:
        raise ValueError("Relevancy needs at least one negative phrase; the scene was made without a text encoder.")
    codebooks = language.codebooks.detach().float()
    gram = torch.stack([gram_matrix(codebook) for codebook in codebooks])
    noise = 4 * torch.finfo(torch.float32).eps * float(gram.diagonal(dim1=1, dim2=2).amax())
    norms = codebooks.new_empty(language.num_levels, language.gaussians.num_gaussians)
    arguments = [*_codes(language), gram.contiguous(), noise, MIN_NORM**2, norms]
    launch.launch(gaussian_answers.decoded_norms, norms.shape[1], arguments, norms.device)
    return GaussianBaseline(norms, _cosines(language, norms, language.negatives).amax(dim=1))


@torch.no_grad()
def gaussian_relevancy(
    language: LanguageScene,
    embeddings: Float[Tensor, "prompts channels"],
    *,
    baseline: GaussianBaseline | None = None,
    temperature: float = 10.0,
) -> Float[Tensor, "levels prompts gaussians"]:
    """Returns LERF's relevancy of each Gaussian to each prompt at each level, 0 to 1.

    Above 0.5 a Gaussian fits the prompt better than every negative. A Gaussian without language has 0 (not the 0.5 that
    the formula gives for a feature of zero): it is never an answer.

    Args:
        language: The scene.
        embeddings: Text embeddings of the prompts; normalised here.
        baseline: ``gaussian_baseline(language)`` if it is at hand; it does not depend on the prompts.
        temperature: Factor on the cosines.
    """
    baseline = gaussian_baseline(language) if baseline is None else baseline
    scores = _cosines(language, baseline.norms, embeddings)
    scores.sub_(baseline.negatives[:, None]).mul_(temperature).sigmoid_()
    return scores.mul_((baseline.norms > 0)[:, None])


def best_level(
    relevancy: Float[Tensor, "levels prompts gaussians"],
) -> tuple[Float[Tensor, "prompts gaussians"], Int[Tensor, " prompts"]]:
    """Returns each prompt's relevancy at the level that answers it best, and that level.

    The best level is the one whose relevancy peaks highest, as for pixels; the peak is the mean of the most relevant
    thousandth of the Gaussians, which does what smoothing does in a picture.
    """
    levels = score_peaks(relevancy).argmax(dim=0)
    return relevancy[levels, torch.arange(relevancy.shape[1], device=relevancy.device)], levels


def score_peaks(scores: Float[Tensor, "*batch gaussians"]) -> Float[Tensor, "*batch"]:
    """Returns the mean of the highest thousandth of the scores, of at least one."""
    count = max(1, round(PEAK_SHARE * scores.shape[-1]))
    return scores.topk(count, dim=-1, sorted=False).values.mean(dim=-1)


def nearest_gaussians(gaussians: GaussianScene, count: int) -> Int[Tensor, "gaussians neighbours"]:
    """Returns each Gaussian's nearest ones, itself among them; fewer where the scene has fewer.

    Computed on the CPU by a k-d tree, a few seconds for a million Gaussians; keep it, the geometry is frozen.
    """
    means = gaussians.means.double().cpu().numpy()
    count = min(count, len(means))
    _, ids = cKDTree(means).query(means, k=count, workers=-1)
    return torch.from_numpy(ids.reshape(len(means), count)).to(gaussians.means.device)


def smooth_scores(
    scores: Float[Tensor, " gaussians"],
    neighbours: Int[Tensor, "gaussians neighbours"],
    opacities: Float[Tensor, " gaussians"],
) -> Float[Tensor, " gaussians"]:
    """Returns half of each score and half of its neighbours' average by opacity; scores of 0 count for nothing."""
    weights = opacities * (scores > 0)
    weighted = weights * scores
    total, weight = torch.zeros_like(scores), torch.zeros_like(scores)
    for column in neighbours.T:
        total += weighted.index_select(0, column)
        weight += weights.index_select(0, column)
    average = total / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.where((scores > 0) & (weight > 0), 0.5 * (scores + average), scores + average)


@torch.no_grad()
def gaussian_classes(
    language: LanguageScene,
    embeddings: Float[Tensor, "prompts channels"],
    *,
    min_relevancy: float = 0.5,
    baseline: GaussianBaseline | None = None,
    neighbours: Int[Tensor, "gaussians neighbours"] | None = None,
) -> tuple[Int[Tensor, " gaussians"], Float[Tensor, " gaussians"]]:
    """Returns the prompt that fits each Gaussian best, -1 where none does, and its relevancy.

    Each prompt is asked at its own best level, as in a selection.

    Args:
        language: The scene.
        embeddings: Text embeddings of the prompts, at least one; hundreds are taken a few at a time.
        min_relevancy: Least relevancy of a class; at 0.5 the prompt fits as well as the best fitting negative.
        baseline: ``gaussian_baseline(language)`` if it is at hand.
        neighbours: ``nearest_gaussians``, over which each prompt's scores are smoothed first; that also gives a class
            to Gaussians without language. None leaves every Gaussian to itself.

    Raises:
        ValueError: If there is no prompt, or ``min_relevancy`` is not in 0..1.
    """
    if not embeddings.shape[0]:
        raise ValueError("Classes need at least one prompt.")
    if not 0 <= min_relevancy <= 1:
        raise ValueError(f"min_relevancy must be from 0 to 1, got {min_relevancy}.")
    baseline = gaussian_baseline(language) if baseline is None else baseline
    best = torch.full_like(baseline.norms[0], -1.0)
    class_ids = torch.full_like(best, -1, dtype=torch.int64)
    for first in range(0, embeddings.shape[0], PROMPTS_AT_ONCE):
        some = embeddings[first : first + PROMPTS_AT_ONCE]
        answers, _ = best_level(gaussian_relevancy(language, some, baseline=baseline))
        if neighbours is not None:
            answers = torch.stack([smooth_scores(own, neighbours, language.gaussians.opacities) for own in answers])
        scores, ids = answers.max(dim=0)
        class_ids = torch.where(scores > best, ids + first, class_ids)
        best = torch.maximum(scores, best)
    return torch.where((best >= min_relevancy) & (best > 0), class_ids, -1), best


def _cosines(
    language: LanguageScene, norms: Float[Tensor, "levels gaussians"], texts: Float[Tensor, "texts channels"]
) -> Float[Tensor, "levels texts gaussians"]:
    from lightning_modules.functional.kernels import gaussian_answers, launch

    units = F.normalize(texts.detach().to(norms), dim=1)
    scores = language.codebooks.detach().to(norms).flatten(0, 1) @ units.T
    out = norms.new_empty(norms.shape[0], units.shape[0], norms.shape[1])
    arguments = [*_codes(language), norms.contiguous(), scores.contiguous(), out]
    launch.launch(gaussian_answers.cosines, norms.shape[1], arguments, norms.device)
    return out


def _codes(language: LanguageScene) -> tuple[Tensor, Tensor]:
    codes = language.codes
    return codes.channel_ids.short().contiguous(), codes.values.detach().float().contiguous()
