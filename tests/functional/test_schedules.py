"""Schedules against the formulas of 3D Gaussian Splatting at their boundaries."""

import numpy as np
import pytest

from lightning_modules.functional.schedules import LearningRates, active_sh_degree, exponential_decay, reduction


def literal_expon_lr(step: int, lr_init: float, lr_final: float, max_steps: int) -> float:
    """The formula of 3DGS's training script, its delay left out, which 3DGS sets to no steps."""
    t = np.clip(step / max_steps, 0, 1)
    return float(np.exp(np.log(lr_init) * (1 - t) + np.log(lr_final) * t))


@pytest.mark.parametrize("iteration", [1, 2, 499, 15_000, 29_999, 30_000, 30_001, 100_000])
def test_positions_decay_as_in_3dgs(iteration):
    expected = literal_expon_lr(iteration, 1.6e-4 * 4.2, 1.6e-6 * 4.2, 30_000)
    assert LearningRates().positions_at(iteration, 4.2) == pytest.approx(expected, rel=1e-12)


def test_a_decay_begins_at_the_first_and_ends_at_the_last_rate():
    assert exponential_decay(0, 0.01, 0.001, 30_000) == pytest.approx(0.01)
    assert exponential_decay(15_000, 0.01, 0.0001, 30_000) == pytest.approx(0.001)
    assert exponential_decay(30_000, 0.01, 0.001, 30_000) == pytest.approx(0.001)
    assert exponential_decay(90_000, 0.01, 0.001, 30_000) == pytest.approx(0.001)


def test_harmonics_gain_a_degree_at_each_multiple():
    degrees = {
        iteration: active_sh_degree(iteration, 1000, 3) for iteration in (1, 999, 1000, 1999, 2000, 3000, 30_000)
    }
    assert degrees == {1: 0, 999: 0, 1000: 1, 1999: 1, 2000: 2, 3000: 3, 30_000: 3}
    assert active_sh_degree(0, 0, 2) == 2


def test_photographs_double_in_size_at_each_boundary():
    assert [reduction(step, [100, 300]) for step in (0, 99, 100, 299, 300, 1000)] == [4, 4, 2, 2, 1, 1]
    assert reduction(0, []) == 1


def test_a_rate_that_cannot_decay_is_refused():
    with pytest.raises(ValueError, match="position_last is 0"):
        LearningRates(position_last=0)
