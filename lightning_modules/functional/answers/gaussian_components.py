"""Gaussians chosen by a prompt, and the separate objects that the chosen ones form."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from lightning_modules.functional.answers.gaussian_answers import (
    best_level,
    gaussian_baseline,
    gaussian_relevancy,
    nearest_gaussians,
    score_peaks,
    smooth_scores,
)
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.splatting.gaussians import GaussianScene


@dataclass(frozen=True)
class SelectionSettings:
    """How relevancy becomes a selection of Gaussians.

    Raises:
        ValueError: If a setting is out of its range.
    """

    threshold: float = 0.6
    """Least score, 0 to 1, on the scale of ``threshold_scale``."""
    threshold_scale: Literal["stretched", "relevancy"] = "stretched"
    """``stretched``: the share of the way from the scene's lowest relevancy to its peak (the mean of the highest
    thousandth). LERF's masks take 0.7 of such a stretch; a Gaussian's own feature is purer than a pixel's, so 0.6 finds
    more of an object and no more around it. It always selects something, also where the prompt names nothing in the
    scene. ``relevancy``: the relevancy itself, 0.5 where the prompt fits no better than a negative; it
    selects nothing where nothing fits, and the right value depends on the text encoder."""
    smoothing_neighbours: int = 8
    """Before the threshold a score becomes half itself and half the average of this many nearest Gaussians (itself one
    of them), weighted by opacity: LERF's smoothing of maps, in 3D. Gaussians without language take the average of those
    that have it, so the holes of the reliability gate close. 1 turns it off."""
    min_opacity: float = 0.1
    """Least opacity; fainter Gaussians take part in no selection."""
    link_reach: float = 2.0
    """Two selected Gaussians are linked when nearer than this many times the sum of their largest standard deviations,
    or this many times the median distance of a selected Gaussian to the next one, whichever is more."""
    num_neighbours: int = 16
    """Links of a Gaussian go to this many nearest selected ones at most."""
    min_component_share: float = 0.1
    """Groups of linked Gaussians smaller than this share of the largest group are dropped; 0 keeps all. The measure is
    the largest group, not the whole selection: of thirty apples each is a small share of the whole."""

    def __post_init__(self) -> None:
        for name in ("threshold", "min_opacity", "min_component_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.threshold_scale not in ("stretched", "relevancy"):
            raise ValueError(f"threshold_scale must be 'stretched' or 'relevancy', got {self.threshold_scale!r}.")
        for name in ("smoothing_neighbours", "num_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.link_reach > 0:
            raise ValueError(f"link_reach must be above 0, got {self.link_reach}.")


class ObjectBox(NamedTuple):
    """One group of linked Gaussians.

    Attributes:
        minimum: Corner of the axis-aligned box around the Gaussians' centres with the least x, y, z; world, metres.
        maximum: The opposite corner.
        num_gaussians: Gaussians of the group.
        mean_score: Their mean score.
    """

    minimum: tuple[float, float, float]
    maximum: tuple[float, float, float]
    num_gaussians: int
    mean_score: float

    @property
    def centre(self) -> tuple[float, ...]:
        """Centre of the box, world, metres."""
        return tuple((low + high) / 2 for low, high in zip(self.minimum, self.maximum, strict=True))

    @property
    def size(self) -> tuple[float, ...]:
        """Lengths of the box along x, y, z, metres."""
        return tuple(high - low for low, high in zip(self.minimum, self.maximum, strict=True))


class Selection(NamedTuple):
    """The answer of a scene to one prompt.

    Attributes:
        selected: [N] the Gaussians that answer it.
        scores: [N] relevancy at the level that answers best, 0 for Gaussians without language.
        level: That level.
    """

    selected: Bool[Tensor, " gaussians"]
    scores: Float[Tensor, " gaussians"]
    level: int


class GaussianSelector:
    """Answers prompt after prompt about one scene; keeps what does not depend on the prompt.

    Args:
        language: The scene.
        settings: Smoothing, threshold, opacity and clean-up.
    """

    def __init__(self, language: LanguageScene, settings: SelectionSettings = SelectionSettings()) -> None:
        self.language, self.settings = language, settings
        self.baseline = gaussian_baseline(language)
        self.neighbours = nearest_gaussians(language.gaussians, settings.smoothing_neighbours)

    def select(self, embedding: Float[Tensor, " channels"]) -> Selection:
        """Returns the Gaussians that answer the prompt of a text embedding."""
        relevancy = gaussian_relevancy(self.language, embedding[None], baseline=self.baseline)
        (scores,), (level,) = best_level(relevancy)
        selected = select_gaussians(self.language.gaussians, scores, self.settings, neighbours=self.neighbours)
        return Selection(selected, scores, int(level))


def select_gaussians(
    gaussians: GaussianScene,
    scores: Float[Tensor, " gaussians"],
    settings: SelectionSettings = SelectionSettings(),
    *,
    neighbours: Int[Tensor, "gaussians neighbours"] | None = None,
) -> Bool[Tensor, " gaussians"]:
    """Returns the Gaussians that answer a prompt, without the scattered ones.

    Args:
        gaussians: The scene.
        scores: Relevancy at one level, 0 for Gaussians without language; see ``gaussian_answers.best_level``.
        settings: Smoothing, threshold, opacity and clean-up.
        neighbours: ``nearest_gaussians(gaussians, settings.smoothing_neighbours)`` if it is at hand; it does not depend
            on the prompt and is most of the work.
    """
    if settings.smoothing_neighbours > 1:
        neighbours = nearest_gaussians(gaussians, settings.smoothing_neighbours) if neighbours is None else neighbours
        scores = smooth_scores(scores, neighbours, gaussians.opacities)
    selected = stretch(scores, settings) >= settings.threshold
    selected &= (scores > 0) & (gaussians.opacities >= settings.min_opacity)
    if settings.min_component_share == 0 or not bool(selected.any()):
        return selected
    groups = linked_groups(gaussians, selected, settings)
    counts = torch.bincount(groups[selected])
    kept = counts >= settings.min_component_share * counts.amax()
    return selected & kept[groups.clamp_min(0)]


def stretch(scores: Float[Tensor, " gaussians"], settings: SelectionSettings) -> Float[Tensor, " gaussians"]:
    """Returns the scores on the scale of the threshold; Gaussians of score 0 have no language and do not count."""
    if settings.threshold_scale == "relevancy" or not bool((scores > 0).any()):
        return scores
    answers = scores[scores > 0]
    lowest, peak = answers.min(), score_peaks(answers)
    return ((scores - lowest) / (peak - lowest + 1e-9)).clamp(0, 1)


def linked_groups(
    gaussians: GaussianScene,
    selected: Bool[Tensor, " gaussians"],
    settings: SelectionSettings = SelectionSettings(),
) -> Int[Tensor, " gaussians"]:
    """Returns the group of each selected Gaussian, the largest being 0, and -1 for the others.

    Computed on the CPU: a k-d tree over the selected Gaussians alone.
    """
    groups = torch.full(selected.shape, -1, dtype=torch.int64, device=selected.device)
    means = gaussians.means[selected].double().cpu().numpy()
    num = len(means)
    if num == 0:
        return groups
    num_links = min(settings.num_neighbours + 1, num)  # the first neighbour is the Gaussian itself, or one at its place
    distances, ids = cKDTree(means).query(means, k=num_links, workers=-1)
    distances, ids = distances.reshape(num, num_links), ids.reshape(num, num_links)
    sizes = gaussians.scales[selected].amax(dim=1).double().cpu().numpy()
    spacing = np.median(distances[:, 1]) if num > 1 else 0.0
    near = distances <= settings.link_reach * np.maximum(sizes[:, None] + sizes[ids], spacing)
    rows = np.broadcast_to(np.arange(num)[:, None], ids.shape)[near]
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, ids[near])), shape=(num, num))
    _, labels = connected_components(graph, directed=False)
    rank = np.argsort(np.argsort(-np.bincount(labels), kind="stable"))
    groups[selected] = torch.from_numpy(rank[labels]).to(groups)
    return groups


def object_boxes(
    gaussians: GaussianScene,
    scores: Float[Tensor, " gaussians"],
    groups: Int[Tensor, " gaussians"],
) -> list[ObjectBox]:
    """Returns the boxes of all groups, in their order.

    Args:
        gaussians: The scene.
        scores: A score of every Gaussian.
        groups: ``linked_groups``: numbers from 0, -1 for Gaussians of no group.
    """
    if not bool((groups >= 0).any()):
        return []
    own, centres, own_scores = groups[groups >= 0], gaussians.means[groups >= 0], scores[groups >= 0]
    counts = torch.bincount(own)
    rows = own[:, None].expand(-1, 3)
    minima = centres.new_zeros(len(counts), 3).scatter_reduce(0, rows, centres, "amin", include_self=False)
    maxima = centres.new_zeros(len(counts), 3).scatter_reduce(0, rows, centres, "amax", include_self=False)
    means = own_scores.new_zeros(len(counts)).index_add(0, own, own_scores) / counts
    columns = (minima.tolist(), maxima.tolist(), counts.tolist(), means.tolist())
    return [ObjectBox(tuple(low), tuple(high), count, mean) for low, high, count, mean in zip(*columns, strict=True)]
