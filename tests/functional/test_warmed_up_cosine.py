import itertools

import pytest

from lightning_modules.functional.schedules import warmed_up_cosine


def test_the_rate_rises_evenly_then_falls_as_a_cosine():
    shares = [warmed_up_cosine(step, 20, 4) for step in range(20)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares[4] == 1.0
    assert warmed_up_cosine(12, 20, 4) == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[4:]))


def test_it_is_zero_from_the_end_on():
    assert warmed_up_cosine(20, 20, 4) == 0
    assert warmed_up_cosine(99, 20, 4) == 0


def test_without_a_warm_up_it_begins_at_the_highest():
    assert warmed_up_cosine(0, 20, 0) == 1
