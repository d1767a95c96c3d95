import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.progressive_layers import ProgressiveLayers, current_layer


@given(st.integers(0, 40_000), st.integers(1, 6))
def test_equals_langsplats_schedule(step, num_layers):
    assert current_layer(step, 10_000, num_layers) == min(int(step / 10_000 * num_layers), num_layers - 1)


def test_switches_at_the_boundaries():
    assert [current_layer(step, 90, 3) for step in (0, 29, 30, 59, 60, 89, 90, 1000)] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ProgressiveLayers(0)
