import math

import pytest
import torch

from lightning_modules.metrics.codebook import CodebookUsage


def test_usage_is_counted_over_all_batches():
    metric = CodebookUsage(8)
    for ids in ([0, 0, 1], [2, 2, 3]):
        metric.update(torch.tensor(ids))
    found = metric.compute()
    assert found["codebook_usage"] == 0.5
    assert found["dead_codes"] == 4
    shares = torch.tensor([2, 1, 2, 1]) / 6
    assert found["token_entropy"] == pytest.approx(float(-(shares * shares.log()).sum()))
    assert found["perplexity"] == pytest.approx(math.exp(found["token_entropy"]))


def test_processes_add_up():
    metrics = [CodebookUsage(4), CodebookUsage(4)]
    metrics[0].update(torch.tensor([0, 1]))
    metrics[1].update(torch.tensor([1, 2]))
    together = CodebookUsage(4)
    together.counts = metrics[0].counts + metrics[1].counts  # what the state's reduction does
    assert together._reductions["counts"] is not None
    assert together.compute()["codebook_usage"] == 0.75


def test_nothing_counted_is_nothing_used():
    found = CodebookUsage(4).compute()
    assert found["codebook_usage"] == 0
    assert found["perplexity"] == 1
