"""Metrics of open-vocabulary queries: means over (frame, prompt) pairs. States are sums, so processes add up."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_modules.functional.answers.lerf_protocol import intersection_over_union


class MeanOverPrompts(Metric):
    """Mean of a value over all (frame, prompt) pairs, as LangSplatV2 takes it inside a scene.

    Args:
        prompts: The prompts that may occur, for the table. Without them only the mean over all is kept.

    Attributes:
        per_prompt: Mean and number of frames of each prompt that occurred, as of the last ``compute``.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, prompts: Sequence[str] = ()) -> None:
        super().__init__()
        self.prompts = tuple(prompts)
        self.per_prompt: dict[str, tuple[float, int]] = {}
        size = max(1, len(self.prompts))
        self.add_state("totals", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, " pairs"], prompts: Sequence[str]) -> None:
        """Adds the values of one frame.

        Raises:
            ValueError: If the metric keeps a table and a value has no prompt, or one that is not in it.
        """
        if self.prompts and (len(prompts) != len(values) or not set(prompts) <= set(self.prompts)):
            raise ValueError(
                f"{len(values)} values come with the prompts {list(prompts)}; each needs one of {list(self.prompts)}."
            )
        rows = [self.prompts.index(prompt) for prompt in prompts] if self.prompts else [0] * len(values)
        ids = torch.tensor(rows, dtype=torch.int64, device=self.totals.device)
        self.totals.index_add_(0, ids, values.to(self.totals))
        self.counts.index_add_(0, ids, torch.ones_like(values).to(self.counts))

    @override
    def compute(self) -> Float[Tensor, ""]:
        """Returns the mean; NaN where there was no pair."""
        # Torchmetrics sums the states over the processes around this call alone, so the table is made here, too.
        rows = zip(self.prompts, self.totals.tolist(), self.counts.tolist(), strict=False)
        self.per_prompt = {prompt: (total / count, int(count)) for prompt, total, count in rows if count}
        return (self.totals.sum() / self.counts.sum()).float()


class OpenVocabularyIoU(MeanOverPrompts):
    """Mean intersection over union."""

    @override
    def update(
        self,
        masks: Bool[Tensor, "prompts height width"],
        targets: Bool[Tensor, "prompts height width"],
        prompts: Sequence[str] = (),
    ) -> None:
        """Adds one frame.

        Args:
            masks: Predicted masks.
            targets: Labelled masks.
            prompts: Their prompts.
        """
        self.add(intersection_over_union(masks, targets), prompts)


class LocalizationAccuracy(MeanOverPrompts):
    """Share of prompts whose most relevant pixel lies in one of their boxes."""

    @override
    def update(self, hits: Bool[Tensor, " prompts"], prompts: Sequence[str] = ()) -> None:
        """Adds one frame."""
        self.add(hits.float(), prompts)


class OverlapAccuracy(MeanOverPrompts):
    """Share of prompts whose mask overlaps its label by more than a threshold: Acc@0.25 and Acc@0.5 of OpenGaussian.

    Args:
        threshold: The intersection over union that must be exceeded.
        prompts: The prompts that may occur, for the table.
    """

    def __init__(self, threshold: float, prompts: Sequence[str] = ()) -> None:
        super().__init__(prompts)
        self.threshold = threshold

    @override
    def update(
        self,
        masks: Bool[Tensor, "prompts height width"],
        targets: Bool[Tensor, "prompts height width"],
        prompts: Sequence[str] = (),
    ) -> None:
        """Adds one frame."""
        self.add((intersection_over_union(masks, targets) > self.threshold).float(), prompts)
