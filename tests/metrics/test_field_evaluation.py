import math

import pytest
import torch

from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings, intersection_over_union, segment
from lightning_modules.metrics.field_evaluation import FieldEvaluation
from lightning_modules.metrics.open_vocabulary import OverlapAccuracy

PROMPTS = ("wood wall", "cup")


def maps_and_targets(seed, levels=2):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(levels, 2, 20, 24, generator=generator)
    targets = torch.zeros(2, 20, 24, dtype=torch.bool)
    targets[0, 3:12, 4:15] = True
    targets[1, 10:18, 12:20] = True
    return maps, targets


def test_masks_alone_are_scored_without_points():
    evaluation = FieldEvaluation(PROMPTS, ProtocolSettings(5, 3))
    maps, targets = maps_and_targets(0)
    evaluation.score("test/{}", maps, PROMPTS, targets, ())
    figures = evaluation.compute("test")
    assert set(figures) == {"test/miou", "test/miou_best_level"}
    masks = segment(maps, ProtocolSettings(5, 3)).masks
    torch.testing.assert_close(figures["test/miou"], intersection_over_union(masks, targets).mean())


def test_boxes_are_scored_with_points():
    evaluation = FieldEvaluation(PROMPTS, ProtocolSettings(5, 3))
    maps, targets = maps_and_targets(0)
    whole = torch.tensor([[0.0, 0.0, 24.0, 20.0]])
    evaluation.score("test/{}", maps, PROMPTS, targets, (whole, whole))
    assert evaluation.compute("test")["test/localization_accuracy"] == 1


def test_a_companion_adds_its_mask():
    maps, targets = maps_and_targets(1)
    companion, _ = maps_and_targets(2)
    protocol = ProtocolSettings(5, 3)
    evaluation = FieldEvaluation(PROMPTS, protocol)
    evaluation.score("test/{}", maps, PROMPTS, targets, (), {0: companion[:, 0]})
    masks = segment(maps, protocol, companions={0: companion[:, 0]}).masks
    alone = segment(maps, protocol).masks
    assert not torch.equal(masks[0], alone[0])
    assert torch.equal(masks[1], alone[1])
    expected = intersection_over_union(masks, targets).mean()
    torch.testing.assert_close(evaluation.compute("test")["test/miou"], expected)


def test_selections_are_never_mixed_with_pictures():
    evaluation = FieldEvaluation(PROMPTS, ProtocolSettings(5, 3))
    _, targets = maps_and_targets(0)
    evaluation.score_selection("test/selection_{}", targets, targets, PROMPTS)
    assert set(evaluation.compute("test")) == {
        "test/selection_miou", "test/selection_acc_25", "test/selection_acc_50",
    }  # fmt: skip


def test_accuracy_of_overlaps_counts_those_above_the_threshold_alone():
    targets = torch.zeros(4, 1, 8, dtype=torch.bool)
    targets[:, 0, :4] = True
    masks = torch.zeros(4, 1, 8, dtype=torch.bool)
    for row, count in enumerate((0, 1, 2, 3)):  # overlaps of 0, 1/4, 1/2, 3/4
        masks[row, 0, :count] = True
    shares = {}
    for threshold in (0.25, 0.5):
        metric = OverlapAccuracy(threshold)
        metric.update(masks, targets)
        shares[threshold] = float(metric.compute())
    assert shares == {0.25: 0.5, 0.5: 0.25}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_overlap_is_not_a_number():
    assert math.isnan(OverlapAccuracy(0.25, PROMPTS).compute())
