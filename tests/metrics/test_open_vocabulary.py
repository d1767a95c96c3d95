import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_modules.functional.answers.lerf_protocol import intersection_over_union
from lightning_modules.metrics.open_vocabulary import LocalizationAccuracy, OpenVocabularyIoU

PROMPTS = ("cup", "fork", "plate")


def frame(seed, prompts=PROMPTS):
    generator = torch.Generator().manual_seed(seed)
    masks, targets = torch.rand(2, len(prompts), 6, 7, generator=generator) > 0.5
    return masks, targets, prompts


def test_the_mean_runs_over_frames_and_prompts_alike():
    metric = OpenVocabularyIoU()
    frames = [frame(0), frame(1, ("cup",)), frame(2, ("fork", "plate"))]
    for one in frames:
        metric.update(*one)
    pairs = torch.cat([intersection_over_union(masks, targets) for masks, targets, _ in frames])
    assert len(pairs) == 6
    torch.testing.assert_close(metric.compute(), pairs.mean())


def test_known_masks():
    a = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    b = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    metric = OpenVocabularyIoU()
    metric.update(a, b, ("cup", "fork"))
    assert float(metric.compute()) == pytest.approx((1 / 3 + 1) / 2)


def test_the_table_has_each_prompts_own_mean_and_frames():
    metric = OpenVocabularyIoU(PROMPTS)
    frames = [frame(0), frame(1, ("cup",))]
    for one in frames:
        metric.update(*one)
    metric.compute()
    first, second = (intersection_over_union(masks, targets) for masks, targets, _ in frames)
    assert metric.per_prompt["cup"] == (pytest.approx(float(first[0] + second[0]) / 2), 2)
    assert metric.per_prompt["plate"] == (pytest.approx(float(first[2])), 1)


def test_a_prompt_that_never_occurred_is_not_in_the_table():
    metric = LocalizationAccuracy(PROMPTS)
    metric.update(torch.tensor([True]), ("fork",))
    metric.compute()
    assert metric.per_prompt == {"fork": (1.0, 1)}


def test_accuracy_is_the_share_of_hits():
    metric = LocalizationAccuracy()
    metric.update(torch.tensor([True, False, True]))
    metric.update(torch.tensor([True]))
    assert metric.compute() == 0.75


@pytest.mark.parametrize("metric", [OpenVocabularyIoU(), LocalizationAccuracy(PROMPTS)])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_to_average_is_not_a_number(metric):
    assert math.isnan(metric.compute())


def test_a_frame_without_prompts_adds_nothing():
    metric = LocalizationAccuracy(PROMPTS)
    metric.update(torch.zeros(0, dtype=torch.bool), ())
    metric.update(torch.tensor([True]), ("cup",))
    assert metric.compute() == 1


def test_reset_forgets():
    metric = OpenVocabularyIoU(PROMPTS)
    metric.update(*frame(0))
    metric.reset()
    metric.update(*frame(1))
    other = OpenVocabularyIoU(PROMPTS)
    other.update(*frame(1))
    assert metric.compute() == other.compute()
    assert metric.per_prompt == other.per_prompt


def test_forward_returns_the_frame_and_adds_it():
    metric, alone = OpenVocabularyIoU(PROMPTS), OpenVocabularyIoU(PROMPTS)
    alone.update(*frame(1))
    metric(*frame(0))
    assert metric(*frame(1)) == alone.compute()
    both = OpenVocabularyIoU(PROMPTS)
    both.update(*frame(0))
    both.update(*frame(1))
    assert metric.compute() == both.compute()
    assert metric.per_prompt == both.per_prompt


@pytest.mark.parametrize("prompts", [(), ("cup",), ("cup", "spoon")])
def test_prompts_that_do_not_fit_the_table_are_named(prompts):
    with pytest.raises(ValueError, match="2 values come with the prompts"):
        LocalizationAccuracy(PROMPTS).update(torch.tensor([True, False]), prompts)


def evaluate(frames):
    iou, accuracy = OpenVocabularyIoU(PROMPTS), LocalizationAccuracy(PROMPTS)
    for seed, prompts in frames:
        masks, targets, prompts = frame(seed, prompts)
        iou.update(masks, targets, prompts)
        accuracy.update(masks[:, 0, 0], prompts)
    numbers = {"mean": float(iou.compute()), "accuracy": float(accuracy.compute())}
    for prompt, (mean, count) in iou.per_prompt.items():
        numbers |= {f"mean of {prompt}": mean, f"frames of {prompt}": count}
    return numbers


def check_process(rank, port, cases):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for frames_of_rank, whole in cases:
        assert evaluate(frames_of_rank[rank]) == pytest.approx(whole)
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_agree_on_the_result_of_one(free_port):
    shares = [
        ([(0, PROMPTS), (1, ("cup",))], [(2, ("plate",))]),
        ([(0, PROMPTS), (1, ("cup",))], []),  # a process without a frame
    ]
    mp.spawn(check_process, (free_port, [(share, evaluate(share[0] + share[1])) for share in shares]), nprocs=2)
