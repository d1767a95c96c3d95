"""All figures of a language field, by the names they are logged under."""

import warnings
from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings, best_level_masks, localize, segment
from lightning_modules.metrics.open_vocabulary import (
    LocalizationAccuracy,
    MeanOverPrompts,
    OpenVocabularyIoU,
    OverlapAccuracy,
)


class FieldEvaluation(nn.Module):
    """The metrics of validation and test; states are sums, so processes add up.

    Args:
        prompts: Prompts that may occur.
        protocol: How relevancy becomes masks and points.
    """

    def __init__(self, prompts: Sequence[str], protocol: ProtocolSettings) -> None:
        super().__init__()
        self.protocol = protocol
        metrics: dict[str, nn.Module] = {}
        for scored in ("val/{}", "test/{}", "test/{}_alpha_gated", "test/{}_ungated", "test/{}_ceiling"):
            metrics[scored.format("miou")] = OpenVocabularyIoU(prompts)
            metrics[scored.format("miou_best_level")] = OpenVocabularyIoU(prompts)
            metrics[scored.format(localization_name(scored))] = LocalizationAccuracy(prompts)
        for selected in ("test/selection_{}", "test/selection_{}_ceiling"):
            metrics[selected.format("miou")] = OpenVocabularyIoU(prompts)
            metrics[selected.format("acc_25")] = OverlapAccuracy(0.25, prompts)
            metrics[selected.format("acc_50")] = OverlapAccuracy(0.5, prompts)
        for name in ("psnr", "psnr_covered", "coverage", "cosine", "cosine_shuffled"):
            metrics[f"test/{name}"] = MeanMetric()
        self.metrics = nn.ModuleDict(metrics)

    def score(
        self,
        scored: str,
        maps: Float[Tensor, "levels prompts height width"],
        prompts: Sequence[str],
        masks: Bool[Tensor, "prompts height width"],
        boxes: Sequence[Float[Tensor, "_ 4"]],
        companions: Mapping[int, Float[Tensor, "levels height width"]] | None = None,
    ) -> None:
        """Adds one view.

        Args:
            scored: Name of the figures with ``{}`` for the metric: ``test/{}_ungated``.
            maps: Relevancy of each level and prompt.
            prompts: The labelled prompts.
            masks: Their labels.
            boxes: Their boxes, x1 y1 x2 y2 in pixels; none where the labels have no boxes, and points are not scored.
            companions: Relevancy of the protocol's second prompts, by number of the first one.
        """
        segmentation = segment(maps, self.protocol, companions=companions)
        best = best_level_masks(segmentation.level_masks, masks)
        self[scored.format("miou")].update(segmentation.masks, masks, prompts)
        self[scored.format("miou_best_level")].update(best, masks, prompts)
        if boxes:
            hits = localize(maps, boxes, self.protocol).hits
            self[scored.format(localization_name(scored))].update(hits, prompts)

    def score_selection(
        self,
        scored: str,
        masks: Bool[Tensor, "prompts height width"],
        targets: Bool[Tensor, "prompts height width"],
        prompts: Sequence[str],
    ) -> None:
        """Adds the silhouettes of 3D selections in one view.

        Args:
            scored: Name of the figures with ``{}`` for the metric: ``test/selection_{}``.
            masks: The silhouettes.
            targets: The labels.
            prompts: The labelled prompts.
        """
        for name in ("miou", "acc_25", "acc_50"):
            self[scored.format(name)].update(masks, targets, prompts)

    def __getitem__(self, name: str) -> Metric:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Returns the figures of ``val`` or ``test`` that anything was added to, and clears them."""
        values = {}
        for name in self.metrics:
            if name.startswith(stage):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The ``compute`` method")  # a process may have had no view
                    value = self[name].compute()  # on every process: computing gathers
                self[name].reset()
                if not value.isnan():  # nothing of the kind was in the data
                    values[name] = value
        return values

    def per_prompt(self, name: str) -> dict[str, tuple[float, int]]:
        """Returns, of a metric over prompts, each prompt's mean and number of frames in the last evaluation."""
        metric = self[name]
        assert isinstance(metric, MeanOverPrompts)
        return metric.per_prompt


def localization_name(scored: str) -> str:
    """Returns the name of the localization figure; the ceiling's is shorter."""
    return "localization" if scored.endswith("ceiling") else "localization_accuracy"
